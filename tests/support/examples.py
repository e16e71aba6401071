"""Number of hypothesis examples of a property: few in `make test`, 200 or more in `make test-long`."""

from __future__ import annotations

import os

from hypothesis import settings

LONG = os.environ.get("APPORTION_LONG") == "1"


def examples(number: int) -> settings:
    """Return hypothesis settings of `number` examples, of 200 or more under APPORTION_LONG=1.

    In `make test` the examples are the same every time, so many of them find no more from one day to the next; the
    long tests draw new ones.
    """
    return settings(max_examples=max(number, 200) if LONG else number)
