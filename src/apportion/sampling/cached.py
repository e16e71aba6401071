"""Plain sampling with a key-value cache, log-probabilities collected while sampling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any, Protocol

import torch
from torch import Tensor

from apportion.config import SamplingConfig
from apportion.errors import ModelError, message
from apportion.models.policy import Policy, contiguous_head
from apportion.types import Rollouts


class Sampler(Protocol):
    """Prompts to rollouts: anything that returns unscored `Rollouts` for token-id prompts can take this place."""

    def __call__(
        self, policy: Policy, prompts: Sequence[Sequence[int]], config: SamplingConfig, generator: torch.Generator
    ) -> Rollouts: ...


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    generator: torch.Generator,
    *,
    model: Any = None,
    uniforms: Tensor | None = None,
) -> Rollouts:
    """Return rollouts of `prompts` (lists of ids), `samples_per_prompt` each, grouped by prompt.

    Every processor of `generate` is off: tokens come from softmax(logits/temperature) without the banned ids. With
    stop="eos" a row ends at its first EOS, which is on the mask; `ended` is True on rows that wrote one.

    Args:
        generator: the only source of randomness.
        model: sample from this model instead of the policy's (its reference, say).
        uniforms: (max_new_tokens,B) float64 in [0, 1): row t chooses token t, and the generator is left alone.
    """
    device, copies = policy.device, config.samples_per_prompt or 1
    ids, mask = left_pad([p for p in prompts for _ in range(copies)], policy.tokenizer.pad_token_id)
    ids, mask = ids.to(device), mask.to(device)
    eos = policy.tokenizer.eos_token_id if config.stop == "eos" else None
    writer = policy.model if model is None else model
    chances = repeat(generator, config.max_new_tokens) if uniforms is None else uniforms.to(device)
    tokens, logprobs, alive = _decode(policy, writer, ids, mask, config, eos, chances)
    group = torch.arange(len(prompts), device=device).repeat_interleave(copies)
    ended = (tokens == eos).any(dim=1) if eos is not None else torch.zeros(len(ids), dtype=torch.bool, device=device)
    return Rollouts(
        prompt_ids=ids,
        prompt_mask=mask,
        response_ids=tokens,
        mask=alive,
        logprobs=logprobs,
        group=group,
        ended=ended,
    )


def _decode(
    policy: Policy,
    model: Any,
    ids: Tensor,
    mask: Tensor,
    config: SamplingConfig,
    eos: int | None,
    chances: Iterable[torch.Generator | Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (tokens (B,T), log-probabilities (B,T), mask (B,T)), T as long as the longest row."""
    pad = policy.tokenizer.pad_token_id
    tokens, logprobs, masks = [], [], []
    alive = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    positions, cache, step_ids = (mask.cumsum(dim=1) - 1).clamp_min(0), None, ids
    for chance in chances:
        with contiguous_head(model):
            out = model(
                input_ids=step_ids,
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        cache = out.past_key_values
        logp = policy.allowed(out.logits[:, -1]).log_softmax(dim=-1)
        refuse_unlike_numbers(logp)
        choice = draw(logp, chance)
        tokens.append(torch.where(alive, choice.squeeze(1), pad))
        logprobs.append(torch.where(alive, logp.gather(1, choice).squeeze(1), 0.0))
        masks.append(alive)
        alive = alive & (tokens[-1] != eos) if eos is not None else alive
        if not alive.any():
            break
        mask = torch.cat([mask, masks[-1][:, None]], dim=1)
        positions, step_ids = positions[:, -1:] + masks[-1][:, None], tokens[-1][:, None]
    return torch.stack(tokens, dim=1), torch.stack(logprobs, dim=1), torch.stack(masks, dim=1)


def refuse_unlike_numbers(logp: Tensor) -> None:
    """Raise ModelError for rows of log-probabilities (B,V) without a finite maximum; nothing can be sampled there."""
    best = logp.amax(dim=-1)
    if not torch.isfinite(best).all():
        row = int((~torch.isfinite(best)).nonzero()[0])
        mend = "Check its weights; if it was trained here, it diverged: lower optim.lr."
        came = float(best[row])
        raise ModelError(message(f"policy's log-probabilities in rollout {row}", came, "finite numbers", mend))


def draw(logp: Tensor, chance: torch.Generator | Tensor) -> Tensor:
    """Return one id a row (B,1) from log-probabilities (B,V), by inverting the cumulative distribution.

    `chance` is a generator, or one uniform number in [0, 1) a row, (B,) float64.

    One uniform a row, where multinomial draws V exponentials; float64, so that no id of probability 0 is ever drawn.
    """
    cumulative = logp.double().exp().cumsum(dim=-1)
    if isinstance(chance, torch.Generator):
        chance = torch.rand(len(logp), dtype=torch.float64, generator=chance, device=chance.device)
    return torch.searchsorted(cumulative, chance[:, None].to(logp.device) * cumulative[:, -1:], right=True)


def left_pad(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return (ids (B,P) int64, mask (B,P) bool), P the longest row, pads on the left."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width)[None, :] >= width - lengths[:, None]
