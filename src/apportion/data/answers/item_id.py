"""The id of a prompt with its K completions, the same in every file that has them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any


def canonical_json(value: Any) -> str:
    """Return the JSON of `value` that is the same for equal values: sorted keys, no spaces, characters as they are."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def item_id(prompt: Any, completions: Sequence[Any]) -> str:
    """Return the SHA-256 of a prompt and its K completions, texts or messages each: 64 hexadecimal digits."""
    whole = canonical_json({"prompt": prompt, "completions": list(completions)})
    return hashlib.sha256(whole.encode()).hexdigest()
