"""Rates of this machine, measured in about a second, and the seconds that a model's counted operations take at them.

Rates are those of a training step's matrix products and of reading memory. docs/demo.md has the model of the cost and
where each number comes from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

ROWS = 512  # positions of a micro-batch
SHAPES = ((576, 576), (576, 1536), (1536, 576))  # of the linear layers of a small model (SmolLM2-135M)
LAYERS = 8  # of each shape: more than a processor's caches hold, as in a model
BUFFER = 128 << 20  # bytes that are read
SECONDS = 0.4  # of each measurement, at least
LEAST = 5  # repetitions
BYTES = {"float32": 4, "bfloat16": 2}
FORWARD, STEP = 2, 4  # operations a weight and token: forward; with the backward pass of frozen weights
FULL_STEP = 6  # with that of weights which learn

# Share of the product rate that each kind of work reaches, and seconds that do not depend on it (docs/demo.md).
EFFICIENCY: Mapping[str, Mapping[str, float]] = {
    "float32": {"read": 0.78, "train": 0.65, "generate": 0.40, "score": 0.78, "update": 0.58},
    "bfloat16": {"read": 0.64, "train": 0.52, "generate": 0.27, "score": 0.64, "update": 0.46},
}


class Rates(NamedTuple):
    """What a machine does a second: operations of float32 and of bfloat16 products, and bytes that it reads."""

    float32: float
    bfloat16: float | None
    reading: float

    def products(self, dtype: str) -> float:
        """Return the rate of products in "float32" or "bfloat16"."""
        return self.bfloat16 if dtype == "bfloat16" and self.bfloat16 is not None else self.float32


def measure(
    dtype: str, device: str = "cpu", seconds: float = SECONDS, product: Callable[[Any, Any], Any] | None = None
) -> Rates:
    """Return the rates of `device` with torch's present threads; that of bfloat16 only where `dtype` is it.

    Args:
        product: x (m,k), weight (n,k) -> x·weightᵀ (m,n), as the program multiplies; None is torch's own.
    """
    low = product_rate("bfloat16", device, seconds, product) if dtype == "bfloat16" else None
    return Rates(product_rate("float32", device, seconds, product), low, reading_rate(device, seconds))


def product_rate(
    dtype: str, device: str = "cpu", seconds: float = SECONDS, product: Callable[[Any, Any], Any] | None = None
) -> float:
    """Return operations/s of a micro-batch through linear layers of a small model, two for each weight and position."""
    import torch

    kind, multiply = getattr(torch, dtype), product or torch.nn.functional.linear
    weights = [torch.full(shape, 0.01, dtype=kind, device=device) for shape in SHAPES for _ in range(LAYERS)]
    inputs = {width: torch.ones(ROWS, width, dtype=kind, device=device) for _, width in SHAPES}

    def layers() -> Any:
        return [multiply(inputs[weight.shape[1]], weight) for weight in weights][-1]

    return 2 * ROWS * sum(weight.numel() for weight in weights) / median_seconds(layers, seconds)


def reading_rate(device: str = "cpu", seconds: float = SECONDS) -> float:
    """Return bytes/s of summing numbers that no cache holds."""
    import torch

    buffer = torch.ones(BUFFER // 4, device=device)
    return BUFFER / median_seconds(buffer.sum, seconds)


def median_seconds(work: Callable[[], Any], seconds: float = SECONDS) -> float:
    """Return the median time of `work`, repeated for `seconds` and at least a few times, after one to warm up.

    `work` returns a tensor; that a number of it is read makes a GPU end what it was given.
    """
    times: list[float] = []
    while len(times) <= LEAST or sum(times) < seconds:
        began = time.perf_counter()
        work().flatten()[0].item()
        times.append(time.perf_counter() - began)
    return median(times[1:])


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
