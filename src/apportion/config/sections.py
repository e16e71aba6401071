"""Sections that several stages share: adapters, the optimizer, sampling, scores."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from apportion.config.schema.rules import (
    Count,
    CountOrZero,
    Fraction,
    Interval,
    Layers,
    NotNegative,
    Positive,
    Switch,
    Variables,
)
from apportion.config.schema.section import Section


class LoraConfig(Section):
    """Low-rank adapters."""

    rank: CountOrZero = 16
    """rank of each adapter; 0 trains all weights instead."""
    alpha: Positive = 32.0
    """the adapter's output is scaled by alpha/rank."""
    targets: Layers = "attention"
    """"attention" (every attention projection), "all" (every linear layer of the blocks), or names."""


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: Positive = 5e-4
    """peak learning rate."""
    warmup: Fraction = 0.05
    """fraction of the steps over which it rises; then it falls linearly to 0."""
    eps: Positive = 1e-5
    """Adam's epsilon."""
    weight_decay: NotNegative = 0.0
    """decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """clip the gradient's norm to this."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """of weights that learn in 16 bit (lora.rank 0): float32, or bfloat16, which saves 4 bytes a weight."""


class SamplingConfig(Section):
    """How responses are generated: plain sampling, no top-k, no top-p."""

    batch_size: Count = 32
    """rollouts a step."""
    samples_per_prompt: Count | None = None
    """rollouts of one prompt; null picks 1, and 4 for estimators that compare a prompt's rollouts."""
    rows: Count | None = None
    """rollouts generated at a time (memory and speed only; the rest enter as others end); null for all at once."""
    max_new_tokens: Count = 24
    """longest response, tokens."""
    stop: Literal["length", "eos"] = "length"
    """"length" generates exactly max_new_tokens (no end is ever sampled); "eos" ends at EOS, and at every id that the
    policy's generation settings list."""
    temperature: Positive = 1.0
    """divides the logits in sampling and in every log-probability."""
    prompt_tokens: Interval | None = Field(default_factory=lambda: [4, 8])
    """keep the first n tokens of each prompt, n drawn evenly from [low, high]; null keeps it all."""
    max_prompt_tokens: Count = 512
    """longest prompt, tokens; a longer one is an error, or left out with skip_bad_rows."""
    chat_template_kwargs: Variables | None = None
    """variables of the policy's chat template, such as {enable_thinking: false}; a row's own win over them."""

    @property
    def max_length(self) -> int:
        """The most tokens that a prompt and its response have together."""
        longest = self.max_prompt_tokens if self.prompt_tokens is None else self.prompt_tokens[1]
        return longest + self.max_new_tokens


class ScoreConfig(Section):
    """Transformation of a sequence's score before it is apportioned; it never acts on single tokens."""

    center: Switch = False
    """subtract the reward model's mean score on its held-out set."""
    scale: Switch = False
    """divide by its standard deviation there."""
    clip: Positive | None = None
    """then clamp to [-clip, clip]; null for none."""
    micro_batch: Count = 32
    """most rollouts a forward pass of a scoring model."""
    micro_tokens: Count = 4096
    """most positions of it, prompts and responses padded to its longest."""
