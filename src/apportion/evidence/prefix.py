"""Prefix scores: from the scoring forward of a decoder with the policy's tokens, else one forward row a prefix."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from apportion.errors import ModelError, ScoreError
from apportion.evidence.ablated import score_ablated
from apportion.evidence.text_reward import with_suffix
from apportion.masking import check_finite, first_index
from apportion.models.reward import RewardModel
from apportion.models.reward.reading import own_pad
from apportion.models.stored_head import HEADS, head_of
from apportion.types import Rollouts

PREFIX = frozenset({"prefix_scores", "prompt_score"})


@contextlib.contextmanager
def capture_head_outputs(model: Any, wanted: bool = True) -> Iterator[list[Tensor]]:
    """Yield a list that receives the output of the model's head in the forward of the `with` block, when `wanted`.

    Decoders apply the head at every position, (B,K,labels), and select the pooled one afterwards.

    Raises:
        ModelError: the model has no head of a known name.
    """
    captured: list[Tensor] = []
    if not wanted:
        yield captured
        return
    head = head_of(model)
    if head is None:
        got = [name for name, _ in model.named_children()]
        fix = "Use a reward model that transformers' AutoModelForSequenceClassification loads."
        raise ModelError(f"head of {type(model).__name__}", got, " or ".join(HEADS), fix)
    handle = head.register_forward_hook(lambda module, args, output: captured.append(output))
    try:
        yield captured
    finally:
        handle.remove()


@torch.no_grad()
def prefix_evidence(
    reward: RewardModel, rollouts: Rollouts, captured: list[Tensor], needs: frozenset[str]
) -> dict[str, Tensor]:
    """Return the needed ones of prefix_scores (B,T), after token t, 0 off the mask, and prompt_score (B,).

    Args:
        captured: the head's outputs of the forward that scored the rollouts; empty for a model that scores text, or
            that does not score every prefix on the way (`Reading.token_scores`): every prefix is then a row of its
            own.

    Raises:
        ScoreError: a prefix score is not finite, or a prompt is empty and its score is needed; it names the rollout.
    """
    if not needs & PREFIX:
        return {}
    before = rollouts.prompt_ids.shape[1]
    if "prompt_score" in needs:
        check_prompts(rollouts)
    if captured:
        scores = _at_prefixes(reward, rollouts, reward.unchecked_scores(captured[-1]))  # (B,P+T)
        prompt = scores[:, before - 1] if before else scores.new_zeros(len(scores))
        scores = torch.where(rollouts.mask, scores[:, before:], 0.0)
    else:
        prompt, scores = _each_prefix(reward, rollouts, "prompt_score" in needs)
    fix = "A failure never becomes a reward: check the reward model's weights and dtype."
    evidence = {"prefix_scores": scores, "prompt_score": prompt}
    return {name: check_finite(name, evidence[name], fix, error=ScoreError) for name in evidence if name in needs}


def scores_tokens(reward: RewardModel, ids: Tensor, mask: Tensor) -> bool:
    """Whether one forward of ids and mask, both (B,K), scores every prefix of a model that scores ids."""
    return reward.reading.token_scores and not reward.suffix and not reward.reads_alone(ids, mask)


def slow_prefixes(reward: RewardModel, tokens: int) -> str | None:
    """Return why prefixes cost more than the forward that scores, where they do: each is then a text of its own.

    Args:
        tokens: of the longest response.
    """
    if reward.text is not None:
        why = "it scores text, whose tokens are not the policy's"
    elif reward.suffix:
        why = "special tokens follow what it scores"
    elif not reward.reading.token_scores:
        why = "it reads a text as a whole"
    else:
        return None
    return f"{why}: each start of a response is a forward of its own, up to {tokens} a rollout"


def _at_prefixes(reward: RewardModel, rollouts: Rollouts, scores: Tensor) -> Tensor:
    """Return `scores` (B,K) of every position at the position where each prefix is read: its last that is no pad id."""
    pad = own_pad(reward.model)
    ids, mask = with_suffix(reward, rollouts)
    if pad is None or not reward.reading.skips_pads or not bool(((ids == pad) & mask).any()):
        return scores
    columns = torch.arange(ids.shape[1], device=ids.device)
    read = torch.where(mask & (ids != pad), columns, -1).cummax(dim=1).values
    return scores.gather(1, torch.where(read < 0, first_index(mask)[:, None], read))


def check_prompts(rollouts: Rollouts) -> None:
    """Raise ScoreError for a rollout without a prompt, which has no prompt score."""
    empty = ~rollouts.prompt_mask.any(dim=1)
    if empty.any():
        row = int(empty.nonzero()[0])
        fix = "Give a prompt (--prompt, or a BOS token at the start of prompts): the method needs its score."
        raise ScoreError("prompt", "no tokens", "at least one token to score", fix, row=row)


def _each_prefix(reward: RewardModel, rollouts: Rollouts, with_prompt: bool) -> tuple[Tensor, Tensor]:
    """Return (prompt score (B,), prefix scores (B,T)) with each prefix scored as a text of its own."""
    rows, ends = rollouts.mask.nonzero(as_tuple=True)
    count = len(rollouts) if with_prompt else 0
    every = torch.arange(count, device=rows.device)
    rows, ends = torch.cat([every, rows]), torch.cat([torch.full_like(every, -1), ends])
    keep = rollouts.valid[rows] & (torch.arange(rollouts.mask.shape[1], device=ends.device) <= ends[:, None])
    prefix = score_ablated(reward, rollouts, rows, keep)
    scores = torch.zeros(rollouts.mask.shape, device=prefix.device)
    scores[rollouts.mask] = prefix[count:]
    return (prefix[:count] if with_prompt else prefix.new_zeros(len(rollouts))), scores
