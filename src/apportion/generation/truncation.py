"""Truncation of the distribution that tokens are drawn from: top-k, top-p and min-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.errors import ConfigError


@dataclass(frozen=True)
class Truncation:
    """The tokens that may be drawn, as transformers' processors of these names choose them, in this order.

    Attributes:
        top_k: the k most likely tokens, and those as likely as the k-th; None for all.
        top_p: of the rest, the fewest most likely tokens whose probabilities sum to p or more (Holtzman et al. 2020,
            arXiv 1904.09751); None for all.
        min_p: of the rest, tokens at least min_p times as likely as the most likely one (Nguyen et al. 2024,
            arXiv 2407.01082); None for all.

    Raises:
        ConfigError: a value outside its range.
    """

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError("top_k", self.top_k, "a whole number >= 1", "Leave it out to keep every token.")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if value is not None and not 0 < value <= 1:
                raise ConfigError(name, value, "a number in (0, 1]", "Leave it out to keep every token.")

    @property
    def active(self) -> bool:
        """Whether it leaves any token out."""
        return any(value is not None for value in (self.top_k, self.top_p, self.min_p))

    def __call__(self, logits: Tensor) -> Tensor:
        """Return logits (B,V) with −inf on tokens that are left out; the most likely token is never one of them."""
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            probabilities, order = logits.double().softmax(dim=-1).sort(dim=-1)
            # summed from the least likely one on, where rounding is smallest
            dropped = probabilities.cumsum(dim=-1) <= 1.0 - self.top_p
            dropped[:, -1] = False
            logits = logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf)
        if self.min_p is not None:
            probabilities = logits.softmax(dim=-1)
            least = self.min_p * probabilities.amax(dim=-1, keepdim=True)
            logits = logits.masked_fill(probabilities < least, -torch.inf)
        return logits
