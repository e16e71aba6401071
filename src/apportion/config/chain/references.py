"""References in a recipe: `${name}` is a variable of `vars`, `${stage.output}` what an earlier stage gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

REFERENCE = re.compile(r"\$\{\s*([^${}]*?)\s*\}")
Lookup = Callable[[str], Any]  # what stands between the braces -> its value


def replaced(value: Any, lookup: Lookup) -> Any:
    """Return `value` with its references replaced, in nested lists and mappings, their keys too.

    A text that is one reference becomes the value itself, of any type; one within a longer text becomes text.
    """
    if isinstance(value, Mapping):
        return {replaced(key, lookup): replaced(one, lookup) for key, one in value.items()}
    if isinstance(value, list):
        return [replaced(one, lookup) for one in value]
    if not isinstance(value, str):
        return value
    whole = REFERENCE.fullmatch(value)
    return lookup(whole[1]) if whole else REFERENCE.sub(lambda found: str(lookup(found[1])), value)


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (keys, value) of everything in nested mappings that is no mapping with keys itself."""
    if isinstance(value, Mapping) and value:
        for key, one in value.items():
            yield from leaves(one, (*path, str(key)))
    else:
        yield path, value
