"""Values of states from fresh rollouts: the mean score of the policy's continuations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from apportion.errors import ConfigError
from apportion.evidence.models import SOURCE_ROW, Models
from apportion.evidence.reward import reward_evidence
from apportion.generation import sample
from apportion.masking import is_segment_start, last_index
from apportion.models.reward import adjust
from apportion.registry import EvidenceKey
from apportion.segments import check
from apportion.types import Rollouts

DEFAULT = 9  # rollouts a state, as in the paper
VINE = frozenset({"vine_values", "vine_calls"})


@torch.no_grad()
def vine_evidence(models: Models, rollouts: Rollouts, needs: frozenset[str]) -> Mapping[str, Tensor]:
    """Return the needed ones of vine_values (B,T), before each action's first token, 0 elsewhere, and vine_calls (B,).

    From every such state the policy generates `samples` fresh continuations (9, or the need's setting), up to the
    run's longest response, and each full text is scored once: `samples` responses an action.

    Raises:
        ConfigError: `models` has no segmenter, sampling settings or generator.
        DataError: an invalid segmentation. ScoreError: a score is not finite.
    """
    if models.segment is None or models.sampling is None or models.generator is None:
        fix = "Give Models the run's segment, sampling and generator."
        raise ConfigError("evidence 'vine_values'", "models without them", "a run's segmenter", fix)
    segments = check(models.segment(rollouts), rollouts.mask)
    starts = is_segment_start(segments)
    evidence: dict[str, Tensor] = {}
    for key in sorted(map(EvidenceKey.of, needs)):
        samples = int(key.settings.get("samples", DEFAULT))
        if key.name == "vine_calls":
            evidence[key] = (starts.sum(dim=1) * samples).float()
        else:
            evidence[key] = state_values(models, rollouts, starts, samples)
    return evidence


def state_values(models: Models, rollouts: Rollouts, starts: Tensor, samples: int) -> Tensor:
    """Return (B,T) the mean score of `samples` continuations from the state before each token in `starts` (B,T)."""
    assert models.sampling is not None
    rows, places = starts.nonzero(as_tuple=True)
    order = places.argsort(stable=True)  # states of similar length together, so that little is generated in vain
    out = torch.zeros(starts.shape, device=starts.device)
    chunk = max(1, models.sampling.batch_size // samples)
    for part in order.split(chunk):
        out[rows[part], places[part]] = _values(models, rollouts, rows[part], places[part], samples)
    return out


def _values(models: Models, rollouts: Rollouts, rows: Tensor, places: Tensor, samples: int) -> Tensor:
    """Return the values (N,) of the states before token `places` (N,) of `rows` (N,)."""
    assert models.sampling is not None and models.generator is not None
    # all valid tokens before the state are part of it, sampled or not
    before = rollouts.valid[rows] & (torch.arange(rollouts.mask.shape[1], device=rows.device) < places[:, None])
    prefixes = [ids[on] for ids, on in zip(rollouts.response_ids[rows], before, strict=True)]
    prompts = [ids[on] for ids, on in zip(rollouts.prompt_ids[rows], rollouts.prompt_mask[rows], strict=True)]
    left = models.sampling.max_new_tokens - torch.tensor([len(p) for p in prefixes])
    settings = models.sampling.model_copy(
        update={"samples_per_prompt": samples, "max_new_tokens": int(left.max().clamp_min(1))}
    )
    states = [torch.cat(pair).tolist() for pair in zip(prompts, prefixes, strict=True)]
    continued = sample(models.policy, states, settings, models.generator)
    # states differ in tokens left: the first n tokens of a longer continuation are a continuation of n tokens
    limit = left.repeat_interleave(samples).to(rows.device)[:, None]
    mask = continued.mask & (torch.arange(continued.mask.shape[1], device=rows.device) < limit)
    full = _full_texts(continued, mask, prompts, prefixes, samples)
    if SOURCE_ROW in rollouts.evidence:  # functions may take the columns of the prompt's row
        full = full.with_evidence(**{SOURCE_ROW: rollouts.evidence[SOURCE_ROW][rows].repeat_interleave(samples)})
    return scores_of(models, full, dense=False).reshape(len(rows), samples).mean(dim=1)


def scores_of(models: Models, rollouts: Rollouts, *, dense: bool = True) -> Tensor:
    """Return the scores (B,) of texts in the units of the batch's scores; `dense` as `Scorer.totals` takes it."""
    if models.rewards is not None:
        return models.rewards.totals(models, rollouts, dense=dense)
    scores = reward_evidence(models.reward_model, rollouts, frozenset({"scores"}))["scores"]
    return adjust(scores, models.reward, models.scores)


def _full_texts(
    continued: Rollouts, mask: Tensor, prompts: list[Tensor], prefixes: list[Tensor], samples: int
) -> Rollouts:
    """Return `continued` with each state's response tokens moved from its prompt back to its response."""
    pieces = []
    for i, (ids, on) in enumerate(zip(continued.response_ids, mask, strict=True)):
        pieces.append(torch.cat([prefixes[i // samples], ids[on]]))
    width = max(int(last_index(mask).max()) + 1, *(len(piece) for piece in pieces))
    ids = continued.prompt_ids.new_zeros(len(pieces), width)
    valid = torch.zeros(len(pieces), width, dtype=torch.bool, device=ids.device)
    for i, piece in enumerate(pieces):
        ids[i, : len(piece)], valid[i, : len(piece)] = piece, True
    before = max(len(p) for p in prompts)
    prompt_ids = ids.new_zeros(len(pieces), before)
    prompt_mask = torch.zeros(len(pieces), before, dtype=torch.bool, device=ids.device)
    for i in range(len(pieces)):
        prompt = prompts[i // samples]
        prompt_ids[i, before - len(prompt) :], prompt_mask[i, before - len(prompt) :] = prompt, True
    return Rollouts(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=ids,
        mask=valid,
        logprobs=torch.zeros(valid.shape, device=ids.device),
        group=torch.zeros(len(pieces), dtype=torch.int64, device=ids.device),
    )
