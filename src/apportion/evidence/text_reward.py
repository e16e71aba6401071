"""Reward models with their own tokenizer: rollouts in its tokens, and its evidence in the policy's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from apportion.errors import ConfigError, ScoreError
from apportion.models.reward import RewardModel
from apportion.models.text.render import Encoded, context_limit, embedding_count, encode, render
from apportion.models.text.transfer import transfer
from apportion.registry import EvidenceKey
from apportion.types import Rollouts

# evidence that is an amount on each token, so that it can be split over characters
TRANSFERABLE = frozenset({"reward_attention", "reward_attribution"})


class Translation(NamedTuple):
    """Rollouts in the reward model's tokens, prompt and response in one, and the character spans of all tokens."""

    rollouts: Rollouts
    source: Tensor  # (B,K,2) int64, characters of the reward model's tokens
    target: Tensor  # (B,T,2) int64, characters of the policy's response tokens in the same texts


def translate(reward: RewardModel, rollouts: Rollouts) -> Translation:
    """Return the rollouts in the tokens of `reward`: decoded, in its chat template where prompts are conversations.

    Raises:
        ScoreError: a text is empty, too long for the model (nothing is truncated), or changed by the chat template;
            it names the rollout. ModelError: as `render` and `encode`.
    """
    assert reward.text is not None
    tokenizer, limit = reward.tokenizer, context_limit(reward.model, reward.tokenizer)
    embeddings = embedding_count(reward.model)
    ended = [True] * len(rollouts) if rollouts.ended is None else rollouts.ended.tolist()
    prompts = _rows(rollouts.prompt_ids, rollouts.prompt_mask)
    responses = _rows(rollouts.response_ids, rollouts.valid)
    rendered, encoded = [], []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        rendered.append(render(tokenizer, reward.text, prompt, response, row=row, ended=ended[row]))
        encoded.append(encode(tokenizer, rendered[-1], embeddings))
        _check_length(row, len(encoded[-1].ids), limit)
    device = rollouts.mask.device
    ids, source = _padded(encoded)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(one.ids)] for one in encoded])
    target = torch.zeros(*rollouts.valid.shape, 2, dtype=torch.int64)
    spans = [span for one in rendered for span in one.spans]
    target[rollouts.valid.cpu()] = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2)
    return Translation(_as_rollouts(ids.to(device), mask.to(device)), source.to(device), target.to(device))


def with_suffix(reward: RewardModel, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), both (B,P+T+S): prompt, response and the `suffix` of a model that scores ids."""
    ids = torch.cat([rollouts.prompt_ids, rollouts.response_ids], dim=1)
    mask = torch.cat([rollouts.prompt_mask, rollouts.valid], dim=1)
    if not reward.suffix:
        return ids, mask
    after = torch.tensor(reward.suffix, device=ids.device).expand(len(ids), -1)
    return torch.cat([ids, after], dim=1), torch.cat([mask, torch.ones_like(after, dtype=torch.bool)], dim=1)


def to_policy(evidence: Mapping[str, Tensor], translation: Translation) -> dict[str, Tensor]:
    """Return evidence (B,) as it is, and amounts on the reward model's tokens (B,K) on the policy's (B,T).

    The amounts keep their scale: the part on the response's characters is transferred, the rest is dropped.

    Raises:
        ConfigError: per-token evidence that is not an amount and cannot be split over characters.
    """
    transferred = {}
    for name, value in evidence.items():
        if value.dim() > 1 and (EvidenceKey.of(name).name not in TRANSFERABLE or value.dim() > 2):
            fix = "Use a reward model with the policy's own tokenizer for this method."
            expected = "one of " + ", ".join(sorted(TRANSFERABLE)) + " under a reward model with its own tokenizer"
            raise ConfigError("evidence", name, expected, fix)
        transferred[name] = value if value.dim() == 1 else transfer(value, translation.source, translation.target)
    return transferred


def _rows(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Return each row's ids on the mask."""
    return [row[real].tolist() for row, real in zip(ids.cpu(), mask.cpu(), strict=True)]


def _check_length(row: int, length: int, limit: int) -> None:
    if length == 0:
        fix = "The policy generated only special tokens after such a prompt: give prompts with text."
        raise ScoreError("text", "no tokens", "at least one for the reward model", fix, row=row)
    if length > limit:
        fix = "Texts are never truncated: shorten the prompts, or lower sampling.max_new_tokens."
        expected = f"at most {limit}, the reward model's context"
        raise ScoreError("text", f"{length} tokens", expected, fix, row=row)


def _padded(encoded: list[Encoded]) -> tuple[Tensor, Tensor]:
    """Return (ids (B,K), spans (B,K,2)), right-padded with 0 and (0, 0)."""
    width = max(len(one.ids) for one in encoded)
    ids = torch.tensor([one.ids + [0] * (width - len(one.ids)) for one in encoded])
    spans = torch.tensor([one.spans + [(0, 0)] * (width - len(one.spans)) for one in encoded])
    return ids, spans


def _as_rollouts(ids: Tensor, mask: Tensor) -> Rollouts:
    rows = len(ids)
    return Rollouts(
        prompt_ids=ids[:, :0],
        prompt_mask=mask[:, :0],
        response_ids=ids,
        mask=mask,
        logprobs=torch.zeros(mask.shape, device=ids.device),
        group=torch.arange(rows, device=ids.device),
    )
