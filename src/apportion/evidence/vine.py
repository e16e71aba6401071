"""Fresh rollouts from the states of a batch: the mean score of what the policy writes from there on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apportion import registry
from apportion.errors import ConfigError
from apportion.evidence.reward import reward_pass
from apportion.generation import sample
from apportion.masking import last_index
from apportion.models.reward import adjust
from apportion.segments import check
from apportion.types import Rollouts

if TYPE_CHECKING:
    from apportion.evidence import Models

DEFAULT = 9  # rollouts a state, as in the paper
GIVES = frozenset({"vine_values", "vine_calls"})


@torch.no_grad()
def vine_pass(models: Models, rollouts: Rollouts, wanted: frozenset[str]) -> Mapping[str, Tensor]:
    """Return what is wanted of vine_values (B,T), before each action's first token, 0 elsewhere, and vine_calls (B,).

    From every such state the policy writes `samples` fresh continuations (9 unless the name carries the setting), as
    long as the batch's longest response may be, and each whole text is scored once: `samples` responses an action.

    Raises:
        ConfigError: the run's actions or its way of sampling are not known here.
        DataError: the actions are not what a segmenter must give. ScoreError: a score is not finite.
    """
    if models.segment is None or models.sampling is None or models.generator is None:
        fix = "Give Models the run's segment, sampling and generator."
        raise ConfigError("evidence 'vine_values'", "models without them", "a run's segments", fix)
    segments = check(models.segment(rollouts), rollouts.mask)
    starts = (segments >= 0) & (
        segments > torch.nn.functional.pad(segments.cummax(dim=1).values, (1, 0), value=-1)[:, :-1]
    )
    found = {}
    for name in sorted(wanted):
        base, settings = registry.asked(name)
        samples = int(settings.get("samples", DEFAULT))
        if base == "vine_calls":
            found[name] = (starts.sum(dim=1) * samples).float()
        else:
            found[name] = state_values(models, rollouts, starts, samples)
    return found


def state_values(models: Models, rollouts: Rollouts, starts: Tensor, samples: int) -> Tensor:
    """Return (B,T) the mean score of `samples` continuations from the state before each token in `starts` (B,T)."""
    assert models.sampling is not None
    rows, places = starts.nonzero(as_tuple=True)
    order = places.argsort(stable=True)  # states of like length together: little is written in vain
    out = torch.zeros(starts.shape, device=starts.device)
    chunk = max(1, models.sampling.batch_size // samples)
    for some in order.split(chunk):
        out[rows[some], places[some]] = _values(models, rollouts, rows[some], places[some], samples)
    return out


def _values(models: Models, rollouts: Rollouts, rows: Tensor, places: Tensor, samples: int) -> Tensor:
    """Return the values (N,) of the states before token `places` (N,) of `rows` (N,)."""
    assert models.sampling is not None and models.generator is not None
    # what was sampled or stood in between before the state is part of it
    kept = rollouts.valid[rows] & (torch.arange(rollouts.mask.shape[1], device=rows.device) < places[:, None])
    prefixes = [ids[on] for ids, on in zip(rollouts.response_ids[rows], kept, strict=True)]
    prompts = [ids[on] for ids, on in zip(rollouts.prompt_ids[rows], rollouts.prompt_mask[rows], strict=True)]
    left = models.sampling.max_new_tokens - torch.tensor([len(p) for p in prefixes])
    settings = models.sampling.model_copy(
        update={"samples_per_prompt": samples, "max_new_tokens": int(left.max().clamp_min(1))}
    )
    states = [torch.cat(pair).tolist() for pair in zip(prompts, prefixes, strict=True)]
    written = sample(models.policy, states, settings, models.generator)
    # each state has its own number of tokens left: the first n of a longer continuation are a continuation of n
    limit = left.repeat_interleave(samples).to(rows.device)[:, None]
    mask = written.mask & (torch.arange(written.mask.shape[1], device=rows.device) < limit)
    whole = _whole(written, mask, prompts, prefixes, samples)
    scores = reward_pass(models.reward, whole, frozenset({"scores"}))["scores"]
    return adjust(scores, models.reward, models.scores).reshape(len(rows), samples).mean(dim=1)


def _whole(written: Rollouts, mask: Tensor, prompts: list[Tensor], prefixes: list[Tensor], samples: int) -> Rollouts:
    """Return `written` with each state's response tokens moved from its prompt to its response, as they were."""
    pieces = []
    for i, (ids, on) in enumerate(zip(written.response_ids, mask, strict=True)):
        pieces.append(torch.cat([prefixes[i // samples], ids[on]]))
    width = max(int(last_index(mask).max()) + 1, *(len(piece) for piece in pieces))
    ids = written.prompt_ids.new_zeros(len(pieces), width)
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
