"""`apportion label` as a real process that can be killed and started again, and a client of its requests."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from commands import ENVIRONMENT

HEADERS = {"X-Apportion": "1"}
START_SECONDS = 60


def write_samples(path: Path, items: int, answers: int = 3) -> Path:
    """Write `items` prompts with answers whose texts say how good they are: quality 1 is the best."""
    rows = [
        {
            "prompt": f"Question {i}: what is to be done?",
            "completions": [f"Answer of quality {(i + j) % answers + 1} to question {i}." for j in range(answers)],
        }
        for i in range(items)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def quality(text: str) -> int:
    """Return the quality that is written in an answer of `write_samples`."""
    found = re.search(r"quality (\d+)", text)
    assert found, text
    return int(found[1])


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class LabelServer:
    """A server; `kill` ends it by SIGKILL, `start` starts it again on the same port."""

    def __init__(self, folder: Path, *arguments: object, **environment: str) -> None:
        self.folder, self.port = folder, free_port()
        self.arguments = [str(word) for word in arguments]
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        self.output = folder / f"server-{self.port}.log"

    @property
    def address(self) -> str:
        """The page's address."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> LabelServer:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "apportion", "label", *self.arguments, "--port", str(self.port)]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=os.environ | ENVIRONMENT | self.environment, stdout=output, stderr=output
            )
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if httpx.get(f"{self.address}/api/health", timeout=5).status_code == 200:
                    return self
            except httpx.HTTPError:
                time.sleep(0.05)
        raise AssertionError(f"the server did not start:\n{self.output.read_text()}")

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """End it by SIGTERM and return its exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: int) -> int:
        if self.process is None:
            return 0
        self.process.send_signal(number)
        code = self.process.wait(timeout=30)
        self.process = None
        return code

    def __enter__(self) -> LabelServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


class Client:
    """An annotator who speaks to the server without a browser."""

    def __init__(self, server: LabelServer | str, name: str, token: str = "") -> None:
        address = server if isinstance(server, str) else server.address
        self.http = httpx.Client(base_url=address, headers=HEADERS, timeout=30)
        self.http.post("/api/session", json={"name": name, "token": token}).raise_for_status()

    def work(self, count: int = 3) -> list[dict[str, Any]]:
        """Return the next items."""
        response = self.http.post("/api/work", json={"count": count})
        response.raise_for_status()
        items: list[dict[str, Any]] = response.json()["items"]
        return items

    def answer(self, number: str, item: str, ranks: list[int | None] | None, **more: Any) -> httpx.Response:
        """Send an answer: a ranking, or a skip where `ranks` is None."""
        kind = "skip" if ranks is None else "ranking"
        return self.http.post("/api/answers", json={"id": number, "item": item, "kind": kind, "ranks": ranks, **more})
