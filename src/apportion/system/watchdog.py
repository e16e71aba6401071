"""A process of its own that ends a run whose user's function hangs, even inside C code that holds Python's lock.

Run by path with the standard library alone: `watchdog.py PARENT SIGNAL`; `deadline.py` starts it and speaks to it. Each
line of its input is a JSON object:

    {"files": {path: text}}            what to leave behind if it has to kill
    {"arm": seconds, "grace": seconds, "polite": bool, "error": text, "last": {path: text}, "trace": {…}}
    {"disarm": true}

The time stands still while the parent is stopped (Ctrl-Z, a debugger), as far as /proc says so, to a second.

When the time is over it sends the signal, once a second, so that Python raises an error in the function (`polite`).
When the grace is over too, Python does not come to: it writes the files and the error, and kills the parent. Where
Python hangs, faulthandler tells even so, from inside a signal's handler: "trace" holds the `signal` that asks it, the
file that it writes to (`from`) and the path that this is copied to (`to`).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from typing import Any

TRACE = 0.2  # seconds that faulthandler has
PAUSE = 0.2  # seconds between looks at a parent that is stopped
AGAIN = 1.0  # seconds between signals, and between looks at whether the parent lives


def main(parent: int, number: int) -> None:
    """Serve until the input ends or the parent is gone."""
    files: dict[str, str] = {}
    armed: dict[str, Any] = {}
    rest = b""
    last = time.monotonic()
    while os.getppid() == parent:
        now = time.monotonic()
        stopped = bool(armed) and paused(parent)
        lost = now - last if stopped else now - last - AGAIN  # longer than it waits: this process was stopped too
        if armed and lost > 0:
            armed |= {name: armed[name] + lost for name in ("next", "end")}
        last = now
        due = PAUSE if stopped else min(armed["next"], armed["end"]) - now if armed else AGAIN
        if select.select([0], [], [], max(0.0, min(due, AGAIN)))[0]:
            read = os.read(0, 1 << 20)
            if not read:
                return
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                said = json.loads(line)
                files = said.get("files", files)
                armed = {} if "disarm" in said or "files" in said else _armed(said)
            continue
        now = time.monotonic()
        if stopped or (armed and paused(parent)):
            continue
        if armed and now >= armed["end"]:
            trace = traced(parent, **armed["trace"]) if armed["trace"] else {}
            end(parent, files | armed["last"] | trace, armed["error"])
            return
        if armed and now >= armed["next"]:
            os.kill(parent, number)
            armed["next"] = now + AGAIN


def paused(process: int) -> bool:
    """Whether the process is stopped or traced, where /proc says so."""
    with contextlib.suppress(OSError), open(f"/proc/{process}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[:1] in ([b"T"], [b"t"])  # after the name, which may hold any
    return False


def _armed(said: dict[str, Any]) -> dict[str, Any]:
    over = time.monotonic() + said["arm"]
    end = over + said["grace"]
    return {"next": over if said["polite"] else end, "end": end, **{k: said[k] for k in ("error", "last", "trace")}}


def traced(parent: int, signal: int, to: str, **place: str) -> dict[str, str]:
    """Return {to: where the parent's Python is}, or {} where it cannot be had."""
    with contextlib.suppress(OSError):
        os.kill(parent, signal)
        time.sleep(TRACE)
        with open(place["from"], encoding="utf-8", errors="replace") as file:
            return {to: file.read()}
    return {}


def end(parent: int, files: dict[str, str], error: str) -> None:
    """Write what is left behind and the error, and kill the parent."""
    for path, text in files.items():
        with contextlib.suppress(OSError):  # a full disk must not keep a hung run alive
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with open(f"{path}.tmp", "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
            os.replace(f"{path}.tmp", path)
    with contextlib.suppress(OSError):
        sys.stderr.write(f"apportion: {error}\n")
        sys.stderr.flush()
    os.kill(parent, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
