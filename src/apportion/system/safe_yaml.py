"""Safe YAML for settings: plain values of bounded size, each key once, no other YAML objects.

A document's size is counted with every alias expanded, so that a small file cannot expand into a large value.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

LONGEST = 1_000_000  # characters of a document
LARGEST = 100_000  # values in it, with every alias expanded
DEEPEST = 50  # values inside one another


class _Loader(yaml.SafeLoader):
    """A loader that reads 5e-4 as a number, as YAML 1.2 does; YAML 1.1 takes it for a word."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return a whole number that can be formatted: 0xfff… may have more digits than Python allows."""
        value: int = super().construct_yaml_int(node)
        str(value)  # ValueError
        return value


class _Dumper(yaml.SafeDumper):
    """A dumper whose output `_Loader` reads back unchanged: the text "5e-4" is quoted."""


_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+")
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


class Excess(yaml.YAMLError):
    """A document that is too long, too large or too deep."""


def load(text: str) -> Any:
    """Return the value of one YAML document; None when it is empty.

    Raises:
        yaml.YAMLError: invalid YAML, a Python tag, a duplicate key, a value that its tag does not allow.
        Excess: a YAMLError too; a document beyond the limits above, or an alias inside its own anchor.
    """
    if len(text) > LONGEST:
        raise Excess(f"{len(text)} characters, at most {LONGEST}")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        size, depth = _measure(node, {}, set())
        if size > LARGEST or depth > DEEPEST:
            raise Excess(f"{size} values, {depth} deep; at most {LARGEST} and {DEEPEST}")
        return loader.construct_document(node)
    except RecursionError as error:
        raise Excess(f"nested more than {DEEPEST} deep") from error
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # raised by Python's own types for a value such as 2001-99-99, !!bool perhaps, or 5000 digits
        raise yaml.YAMLError(f"a value that cannot be read: {error}") from error
    finally:
        loader.dispose()


def lines(text: str) -> dict[tuple[str, ...], int]:
    """Return {keys from the outermost: line, from 1} of the nested mappings of a document that `load` accepts."""
    found: dict[tuple[str, ...], int] = {}

    def walk(node: yaml.Node | None, keys: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    found[(*keys, key.value)] = key.start_mark.line + 1
                    walk(value, (*keys, key.value))

    walk(yaml.compose(text, Loader=_Loader), ())
    return found


def dump(value: Any) -> str:
    """Return the YAML of plain values, keys in their order; `load` reverses it."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], inside: set[int]) -> tuple[int, int]:
    """Return (number of values, depth) of `node` with its aliases expanded. Raises for a duplicate key."""
    if isinstance(node, yaml.ScalarNode):
        return 1, 1
    if id(node) in known:
        return known[id(node)]
    if id(node) in inside:
        raise Excess("an alias inside its own anchor", node.start_mark)
    inside.add(id(node))
    if isinstance(node, yaml.MappingNode):
        _check_unique(node)
        parts = [part for pair in node.value for part in pair]
    else:
        parts = node.value
    measured = [_measure(part, known, inside) for part in parts]
    inside.discard(id(node))
    known[id(node)] = 1 + sum(size for size, _ in measured), 1 + max((depth for _, depth in measured), default=0)
    return known[id(node)]


def _check_unique(node: yaml.MappingNode) -> None:
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            name = (key.tag, key.value)
            if name in seen and key.value != "<<":
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"the key {key.value!r} is repeated in line {line}")
            seen.add(name)
