"""Lines to stderr that can be lost without harm: whoever reads them may be gone before the run is over."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def write(text: str) -> None:
    """Write `text` to stderr at once; where nobody reads it any more (a pipe whose reader ended), it is lost.

    Safe in a signal handler: what cannot be written from there is lost as well.
    """
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except BrokenPipeError:
        # for good: what is left in the buffer, and what other libraries write, must not fail either
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stderr.fileno())
            os.close(nowhere)
    except (OSError, ValueError, RuntimeError, AttributeError):
        # a terminal that is gone, a closed stream, a handler amid another write, a process without stderr
        return


def write_to_terminal(text: str) -> None:
    """Write `text` where stderr is a terminal."""
    with suppress(ValueError, AttributeError):  # closed, or none
        if sys.stderr.isatty():
            write(text)
