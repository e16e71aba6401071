"""Plain sampling with a key-value cache; log-probabilities are recorded while sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apportion.config.sections import SamplingConfig
from apportion.generation.decode import Decoder, SamplingRules, left_pad
from apportion.generation.decoding import make_step_model
from apportion.generation.truncation import Truncation
from apportion.models.policy import Policy
from apportion.types import Rollouts


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    generator: torch.Generator,
    *,
    model: Any = None,
    uniforms: Tensor | None = None,
    truncation: Truncation | None = None,
) -> Rollouts:
    """Return rollouts of `prompts` (lists of ids), `samples_per_prompt` each, grouped by prompt.

    Tokens are sampled from softmax(logits/temperature) without the banned ids, and unless `truncation` is given without
    top-k, top-p or any other processor. With stop="eos" a row ends at the first of the policy's ends, which is on the
    mask; `ended` is True on such rows. Each prompt is prefilled once for all its samples; finished rows leave, and with
    `config.rows` others enter.

    Args:
        generator: the only source of randomness: one uniform a rollout and token, drawn before the first token, so that
            a rollout does not depend on the other rows of the batch.
        model: sample from this model instead of the policy's, such as its reference.
        uniforms: (B,max_new_tokens) float64 in [0, 1) to sample with, instead of the generator.
        truncation: leaves tokens out. `logprobs` remain those of the whole distribution; those of the one that was
            drawn from are evidence "sampling_logprobs" (B,T).

    Raises:
        ModelError: a log-probability is not finite, or the model cannot be sampled from exactly (`decoding`).
    """
    device, copies = policy.device, config.samples_per_prompt or 1
    total = len(prompts) * copies
    if uniforms is None:
        uniforms = draw_uniforms(total, config.max_new_tokens, generator)
    pad = policy.pad
    banned, ends = (
        torch.tensor(ids, dtype=torch.int64, device=device)
        for ids in (policy.banned, policy.ends if config.stop == "eos" else ())
    )
    active = truncation if truncation is not None and truncation.active else None
    rules = SamplingRules(banned, policy.temperature, ends, pad, active)
    rows = min(total, config.rows or total)
    longest = max(len(p) for p in prompts) + config.max_new_tokens
    step_model = make_step_model(policy, policy.model if model is None else model, rows, longest)
    decoder = Decoder(step_model, prompts, copies, rows, rules, uniforms.to(device))
    tokens, logprobs, mask = decoder.run()
    ids, seen = left_pad([p for p in prompts for _ in range(copies)], pad)
    rollouts = Rollouts(
        prompt_ids=ids.to(device),
        prompt_mask=seen.to(device),
        response_ids=tokens,
        mask=mask,
        logprobs=logprobs,
        group=torch.arange(len(prompts), device=device).repeat_interleave(copies),
        ended=(torch.isin(tokens, ends) & mask).any(dim=1),
    )
    truncated = decoder.out.truncated
    return rollouts if truncated is None else rollouts.with_evidence(sampling_logprobs=truncated[:, : mask.shape[1]])


def draw_uniforms(rollouts: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Return the random numbers of a batch, (rollouts,tokens) float64 in [0, 1)."""
    return torch.rand(rollouts, tokens, dtype=torch.float64, generator=generator, device=generator.device)
