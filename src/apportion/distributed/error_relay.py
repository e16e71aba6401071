"""Reports one rank's error while the other ranks are blocked in a collective.

torch elastic's `record` gives an error to the launcher, which prints it and ends the other ranks, but it cannot keep
two promises of a run: that status.json names the error, and that one message is shown. The other ranks fail as well
when the connection to the failed one closes; main's traceback would be a second message, and main would write
"connection closed" into status.json. So the first rank that fails claims the report in the launcher's store, reports
its error and leaves; a rank that fails after it leaves silently, and torchrun ends those that are still blocked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from apportion.distributed import collectives

KEY = "apportion/errors"


@contextmanager
def relay_errors(end: Callable[[str], None]) -> Iterator[None]:
    """Run a part in which ranks wait for one another: an error that is not raised in all of them ends all.

    Args:
        end: ends this process with that message on stderr and in the run folder. Main raises its error instead.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if getattr(error, "shared", False):
            raise
        if not _is_first():
            os._exit(2)  # pragma: no cover (a consequence: the message is another rank's; which rank is chance)
        error.shared = True  # type: ignore[union-attr]
        if not collectives.is_main():
            end(str(collectives.error_of_process(collectives.rank(), collectives.describe_error(error))))
        raise


def _is_first() -> bool:
    """Claim the report; return whether no other rank did before."""
    store: Any = dist.distributed_c10d._get_default_store()
    try:
        return int(store.add(KEY, 1)) == 1
    except RuntimeError:  # main served the store, and is gone
        return collectives.is_main()
