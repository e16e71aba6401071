"""A reward model with its own tokenizer: rollouts in its tokens, and what it tells of them in the policy's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from apportion import registry
from apportion.errors import ConfigError, ScoreError
from apportion.models.reward import RewardModel
from apportion.models.text.render import Encoded, context_limit, encode, read_as_text
from apportion.models.text.transfer import carry
from apportion.types import Rollouts

# evidence that is an amount on each token, so that characters can share it
CARRIED = frozenset({"reward_attention", "reward_attribution"})


class Translation(NamedTuple):
    """Rollouts in the reward model's tokens (no prompt apart from the response), and where all tokens stand."""

    rollouts: Rollouts
    source: Tensor  # (B,K,2) int64, characters of the reward model's tokens
    target: Tensor  # (B,T,2) int64, characters of the policy's response tokens in the same texts


def translate(reward: RewardModel, rollouts: Rollouts) -> Translation:
    """Return the rollouts as `reward` reads them: decoded, in its chat template where prompts are conversations.

    Raises:
        ScoreError: a text is empty, too long for the model (nothing is cut off), or changed by the chat template; it
            names the rollout. ModelError: as `read_as_text` and `encode`.
    """
    assert reward.text is not None
    tokenizer, limit = reward.tokenizer, context_limit(reward.model, reward.tokenizer)
    embeddings = reward.model.get_input_embeddings().num_embeddings
    prompts = _rows(rollouts.prompt_ids, rollouts.prompt_mask)
    responses = _rows(rollouts.response_ids, rollouts.valid)
    readings, encoded = [], []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        readings.append(read_as_text(tokenizer, reward.text, prompt, response, row=row))
        encoded.append(encode(tokenizer, readings[-1], embeddings))
        _check_length(row, len(encoded[-1].ids), limit)
    device = rollouts.mask.device
    ids, source = _padded(encoded)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(one.ids)] for one in encoded])
    target = torch.zeros(*rollouts.valid.shape, 2, dtype=torch.int64)
    spans = [span for reading in readings for span in reading.spans]
    target[rollouts.valid.cpu()] = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2)
    return Translation(_as_rollouts(ids.to(device), mask.to(device)), source.to(device), target.to(device))


def to_policy(found: Mapping[str, Tensor], translation: Translation) -> dict[str, Tensor]:
    """Return evidence (B,) as it is, and amounts on the reward model's tokens (B,K) on the policy's (B,T).

    The amounts keep their scale: what lies on the response's characters arrives there, the rest stays out.

    Raises:
        ConfigError: evidence a token that is no amount, which characters cannot share.
    """
    carried = {}
    for name, value in found.items():
        if value.dim() > 1 and (registry.asked(name)[0] not in CARRIED or value.dim() > 2):
            fix = "Use a reward model with the policy's own tokenizer for this method."
            expected = "one of " + ", ".join(sorted(CARRIED)) + " under a reward model with its own tokenizer"
            raise ConfigError("evidence", name, expected, fix)
        carried[name] = value if value.dim() == 1 else carry(value, translation.source, translation.target)
    return carried


def _rows(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Return each row's ids on the mask."""
    return [row[real].tolist() for row, real in zip(ids.cpu(), mask.cpu(), strict=True)]


def _check_length(row: int, length: int, limit: int) -> None:
    if length == 0:
        fix = "The policy wrote special tokens alone after such a prompt: give prompts with text."
        raise ScoreError("text", "no tokens", "at least one for the reward model", fix, row=row)
    if length > limit:
        fix = "Nothing is cut off: shorten the prompts, or lower sampling.max_new_tokens."
        expected = f"at most {limit}, the reward model's context"
        raise ScoreError("text", f"{length} tokens", expected, fix, row=row)


def _padded(encoded: list[Encoded]) -> tuple[Tensor, Tensor]:
    """Return (ids (B,K), spans (B,K,2)) on the right of which shorter rows have 0 and (0, 0)."""
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
