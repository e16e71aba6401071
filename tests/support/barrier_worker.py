"""As a program, under torchrun: what the collectives do where the main process fails first, and where there is nothing.

`barrier_worker.py OUT` writes OUT/rank-R.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from apportion.distributed import collectives, error_relay
from apportion.errors import DataError


def failing(ranks: tuple[int, ...]) -> dict[str, Any]:
    """Return what this process raises where those `ranks` fail in a block."""
    error = DataError("column", collectives.rank(), "another number", "Change it.")
    try:
        with collectives.error_barrier():
            if collectives.rank() in ranks:
                raise error
    except Exception as raised:
        return {"class": type(raised).__name__, "text": str(raised), "own": raised is error}
    return {}


def relayed() -> dict[str, Any]:
    """Return what the second process says where it alone fails, while the first waits for nothing."""
    messages: list[str] = []
    try:
        with error_relay.relay_errors(messages.append):
            if collectives.rank() == 1:
                raise DataError("column", "words", "a number", "Change it.")
    except DataError as error:
        return {"messages": messages, "shared": error.shared}  # type: ignore[attr-defined]
    return {}


def main() -> None:
    """Run every case and write the results."""
    collectives.start(torch.device("cpu"))
    found = {
        "main": failing((0,)),
        "both": failing((0, 1)),
        "second": failing((1,)),
        "none": failing(()),
        "empty sum": collectives.all_reduce_sum({}),
        "relayed": relayed(),
    }
    (Path(sys.argv[1]) / f"rank-{collectives.rank()}.json").write_text(json.dumps(found))
    collectives.stop()
    collectives.stop()  # a second time: there is nothing to close


if __name__ == "__main__":
    main()
