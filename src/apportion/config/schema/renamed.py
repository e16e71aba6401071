"""Settings of version 0.1.0 under their new names, for the errors that point to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from apportion.errors import ConfigError

NEW_KEYS: Mapping[str, str] = {
    "guards": "monitors",
    "clips": "excerpts",
    "clip_tokens": "excerpt_tokens",
    "probe_clips": "probe_excerpts",
}
NEW_VALUES: Mapping[str, str] = {"tighten": "raise_kl_coef"}  # of the monitors


def renamed_key(field: str, name: str, value: Any = None) -> ConfigError | None:
    """Return the error that names the new key of `name` (dotted, with or without --), or None where it is not renamed.

    Args:
        field: what the error is about: "flag", "key", or "FILE: key".
        value: the setting's value or section, whose own old words the error translates as well.
    """
    parts = name.removeprefix("--").split(".")
    new = ".".join(NEW_KEYS.get(part, part) for part in parts)
    if parts == new.split("."):
        return None
    new = ("--" if name.startswith("--") else "") + new
    words = value.values() if isinstance(value, Mapping) else [value]
    old = sorted({word for word in words if isinstance(word, str)} & set(NEW_VALUES))
    also = "".join(f" Write {NEW_VALUES[word]} for {word}." for word in old)
    return ConfigError(field, name, f"{new}: the setting was renamed", f"Write {new}.{also}")


def check_renamed(names: Iterable[str], where: str, alternative: str) -> None:
    """Raise ConfigError for the first of the dotted `names` that was renamed.

    Args:
        where: the file that the names are from. alternative: what else to do than rename it there.
    """
    for name in names:
        error = renamed_key(f"{where}: key", name)
        if error is not None:
            raise ConfigError(error.field, error.got, error.expected, f"{error.fix} {alternative}")
