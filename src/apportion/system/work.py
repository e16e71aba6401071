"""Seconds of a model's work: counted operations and bytes over the machine's rates, at measured efficiencies.

docs/demo.md has the model of the cost and where each number comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from apportion.system.rates import Rates

BYTES = {"float32": 4, "bfloat16": 2}
FORWARD, STEP = 2, 4  # operations a weight and token: forward; with the backward pass of frozen weights
FULL_STEP = 6  # with that of weights which learn

# Share of the product rate that each kind of work reaches, and seconds that do not depend on it (docs/demo.md).
EFFICIENCY: Mapping[str, Mapping[str, float]] = {
    "float32": {"read": 0.78, "train": 0.65, "generate": 0.40, "score": 0.78, "update": 0.58},
    "bfloat16": {"read": 0.64, "train": 0.52, "generate": 0.27, "score": 0.64, "update": 0.46},
}


def share(kind: str, dtype: str) -> float:
    """Return the share of the product rate that this kind of work reaches."""
    return EFFICIENCY[dtype][kind]


class Work(NamedTuple):
    """What a machine of these rates does in one precision; `share` (kind, dtype) is of the rate that it reaches."""

    rates: Rates
    dtype: str
    share: Callable[[str, str], float] = share

    def products(self, kind: str, operations: float, dtype: str = "") -> float:
        """Return the seconds of matrix products of one `kind` of work."""
        dtype = dtype or self.dtype
        return operations / (self.share(kind, dtype) * self.rates.products(dtype))

    def generation(self, blocks: float, head: float, rows: int, prompt: float, new: float) -> float:
        """Return the seconds of `rows` responses: the products of their tokens, or reading the weights once a token.

        Args:
            blocks, head: weights of the blocks' linear layers, and of the output layer.
            prompt, new: tokens of a prompt and of a response.
        """
        operations = FORWARD * rows * (blocks * (prompt + new) + head * new)
        reading = new * (blocks + head) * BYTES[self.dtype] / self.rates.reading
        return max(self.products("generate", operations), reading)
