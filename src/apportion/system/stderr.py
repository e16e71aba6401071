"""Writing to stderr without errors: its reader may be gone before the run is over."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def write(text: str) -> None:
    """Write `text` to stderr at once; it is lost where nobody reads it any more (a pipe whose reader ended).

    Safe in a signal handler: text that cannot be written from there is lost as well.
    """
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except BrokenPipeError:
        # for good: the rest of the buffer, and other libraries' writes, must not fail either
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stderr.fileno())
            os.close(nowhere)
    except (OSError, ValueError, RuntimeError, AttributeError):
        # a terminal that is gone, a closed stream, a handler during another write, a process without stderr
        return


def write_to_terminal(text: str) -> None:
    """Write `text` where stderr is a terminal."""
    with suppress(ValueError, AttributeError):  # closed, or none
        if sys.stderr.isatty():
            write(text)
