"""An alarm for errors that strike one process while others wait for it inside an exchange, where none can be told.

The process that fails writes its error to a store that the main process serves; a thread of the main process reads it
there and ends the run. The launcher then ends the processes that wait.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from apportion.distributed import collectives

KEY = "error"
LOOK = 0.5  # seconds between looks at the store
GRACE = 1.0  # seconds that the main process has to leave by itself, where it fails as well
STAY = 60.0  # seconds that the process that failed stays for the main one to say so


class Alarm:
    """Serves several processes, which make it at once.

    Args:
        end: called in the main process, by a thread, with what went wrong; it must end the process.
    """

    def __init__(self, end: Callable[[str], None]) -> None:
        self._end = end
        self._over = threading.Event()
        host = os.environ.get("MASTER_ADDR", "localhost")
        server = _store(host, 0, serves=True) if collectives.is_main() else None
        port = collectives.broadcast_object(0 if server is None else server.port)
        self._store = _store(host, port, serves=False) if server is None else server
        if server is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def ringing(self) -> Iterator[None]:
        """Run a part in which processes wait for one another: an error that not all of them know of ends all."""
        try:
            yield
        except (Exception, SystemExit) as error:
            if not getattr(error, "told", False):
                error.told = True  # type: ignore[union-attr]
                self._over.set()
                if not collectives.is_main():
                    self._ring(error)
            raise

    def _ring(self, error: BaseException) -> None:
        said = collectives.error_of_process(collectives.rank(), collectives.describe_error(error))
        with suppress(RuntimeError):  # the main process is gone, and the store with it
            self._store.set(KEY, str(said))
            end = time.monotonic() + STAY
            while time.monotonic() < end and self._store.check([KEY]):
                time.sleep(LOOK)

    def _watch(self) -> None:
        while not self._over.wait(LOOK):
            if self._store.check([KEY]):
                text = self._store.get(KEY).decode()
                if not self._over.wait(GRACE):
                    self._end(text)
                return

    def off(self) -> None:
        """Stop watching: no process waits for another's weights from now on."""
        self._over.set()


def _store(host: str, port: int, *, serves: bool) -> Any:
    """Return a store of small texts, served by this process or by another one."""
    make: Any = dist
    return make.TCPStore(host, port, is_master=serves, timeout=collectives.PATIENCE, wait_for_workers=False)
