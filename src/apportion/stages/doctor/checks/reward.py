"""Checks of the loaded reward model: head, padding, attention and scores."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from apportion.errors import ModelError
from apportion.evidence.reward import check_attention
from apportion.evidence.text_reward import translate, with_suffix
from apportion.models.pretrained import load_settings
from apportion.models.reward import RewardModel, adjust, load_reward
from apportion.models.reward.reading import Reading, fill_id, own_pad, pad_set_to
from apportion.models.stored_head import head_of
from apportion.stages.doctor.case import Case
from apportion.stages.doctor.checks.method import needs_attention, reads_attention
from apportion.stages.doctor.checks.policy import finite_weights, rollouts_of, size
from apportion.stages.doctor.checks.probes import ATTENTION, SCORE
from apportion.stages.doctor.checks.reward_tokenizer import policy_text
from apportion.stages.doctor.findings import Result, fail, grade, ok, skip, warn

SATURATED = 12.0  # |logit difference| where a sigmoid is 1 to five digits


def head(case: Case) -> Result:
    """The reward model's weights and head are stored, and the head does not look newly initialised."""
    case.reward = load_reward(
        case.reward_folder,
        dtype=case.config.reward_dtype,
        device=case.config.device,
        pad_token=case.config.pad_token,
        policy=policy_text(case),
        fast_kernels=case.config.fast_kernels,
        positive=case.config.positive_label,
    )
    model = case.reward.model
    message = size(model)
    layer = score_layer(model)
    labels = [str(v) for v in (model.config.id2label or {}).values()]
    good = f", {labels[case.reward.positive]} is good" if len(labels) == 2 else ""
    message = f"{message}; labels {', '.join(labels)}{good}; {described(case.reward.reading)}"
    if layer is None:
        return ok(f"{message}; head not checked")
    weight = layer.weight.detach().float()
    spread = float(weight.std()) if weight.numel() > 1 else 0.0
    sd = float(getattr(load_settings("reward_model", case.reward_folder), "initializer_range", 0.0) or 0.0)
    message = f"{message}; head of {weight.numel()} weights, sd {spread:.3g}"
    if case.reward.sd is None and looks_initialised(weight, layer.bias, sd):
        message = f"{message}, like a newly initialised one (initializer_range {sd:g})"
        if case.labelled:  # the order of its scores decides
            return ok(message)
        return warn(
            message,
            "Make sure that it was trained: pass labelled texts with --labels to check the order of its scores.",
        )
    return ok(message)


def described(reading: Reading) -> str:
    """Return in words how a text is read."""
    kind = "decoder" if reading.causal else "encoder"
    places = {"first": "read at the first token", "last": "read at the last token", "pooled": "pooled over positions"}
    alone = "" if reading.batched else ", one row at a time: its score depends on padding"
    return f"{kind}, its score {places[reading.place]}{alone}"


def score_layer(model: Any) -> nn.Linear | None:
    """Return the layer that gives the score: the last linear one in the head, or None where there is none."""
    found = head_of(model)
    layers = [] if found is None else [layer for layer in found.modules() if isinstance(layer, nn.Linear)]
    return layers[-1] if layers else None


def looks_initialised(weight: Tensor, bias: Tensor | None, sd: float) -> bool:
    """Whether `weight` looks like a sample of N(0, sd²) and the bias is zero, as in a head that was never trained.

    Mean, standard deviation and mean |w| are each within 2.5 standard errors of the normal distribution's; training
    changes all three, and any step changes a bias.
    """
    count = weight.numel()
    if not sd or count < 2 or (bias is not None and bool(bias.any())):
        return False
    # of the mean: sd/√n; of the standard deviation: sd/√(2n); of the mean |w|: sd·√((1 − 2/π)/n)
    mean, spread, size = float(weight.mean()), float(weight.std()), float(weight.abs().mean())
    expected = ((mean, 0.0, 1.0), (spread, 1.0, 0.5), (size, math.sqrt(2 / math.pi), 1 - 2 / math.pi))
    return all(abs(got - sd * value) <= 2.5 * sd * math.sqrt(variance / count) for got, value, variance in expected)


def finite(case: Case) -> Result:
    """Every weight of the reward model is finite."""
    return finite_weights(case.reward.model, "reward model")


def padding(case: Case) -> Result:
    """A score does not depend on its padding."""
    ids, mask = inputs(case)
    reward, pad_id = case.reward, own_pad(case.reward.model) or 0
    in_batch = reward.score(ids, mask)[0]
    spread = max(1.0, float(in_batch.std(unbiased=False)))
    padded = {"right": reward.score(*pad_both(ids, mask, 0, 3, pad_id))[0]}
    if reward.reading.causal:
        padded["left"] = reward.score(*pad_both(ids, mask, 5, 0, pad_id))[0]
    padded["alone"] = torch.cat(
        [reward.score(row[real][None], real[real][None])[0] for row, real in zip(ids, mask, strict=True)]
    )
    gaps = {side: float((value - in_batch).abs().max()) for side, value in padded.items()}
    message = ", ".join(f"{side} {gap:.2g}" for side, gap in gaps.items())
    worst = max(gaps.values(), key=lambda gap: (gap != gap, gap))
    fix = "Scores depend on the batch: check the pad token's embedding and pad_token_id of the reward model."
    return grade(worst / spread, SCORE[next(reward.model.parameters()).dtype], f"differences in score: {message}", fix)


def attention(case: Case) -> Result:
    """The attention row that credit uses equals the model's eager attention."""
    if not reads_attention(case):
        return skip("no credit of this run uses it")
    reward = case.reward
    ids, mask = inputs(case)
    if not reward.reading.batched:
        ids, mask = ids[:1][mask[:1]][None], mask[:1][mask[:1]][None]
    try:
        check_attention(reward)
        _, row, positions = reward.score(ids, mask, attention=True)
    except ModelError as error:
        if needs_attention(case):
            raise
        return skip(f"it is only logged, and left out: {error.field}: {error.got}")
    assert row is not None
    with eager(reward.model) as supported:
        full = full_attention(reward, ids, mask) if supported else None
    if full is None:
        return ok(f"computed for {len(ids)} texts; the model has no eager attention to compare it with")
    expected = full[torch.arange(len(ids)), :, positions].float().mean(dim=1)
    gap = float((row - expected).abs().max())
    message = f"{gap:.2g} from eager attention at most, over {len(ids)} texts"
    fix = "Use a credit that needs no attention (uniform, sparse) with this reward model."
    return grade(gap, ATTENTION[next(reward.model.parameters()).dtype], message, fix)


@torch.no_grad()
def full_attention(reward: RewardModel, ids: Tensor, mask: Tensor) -> Tensor | None:
    """Return the last layer's attention (B,H,K,K) as the model returns it, or None where it returns none."""
    ids, inputs = reward.inputs(ids, mask)
    with pad_set_to(reward.model, fill_id(reward.model, ids, mask)):
        layers = reward.model(**inputs, output_attentions=True).attentions
    return layers[-1] if layers else None


@contextlib.contextmanager
def eager(model: Any) -> Iterator[bool]:
    """Switch `model` to eager attention inside the block; yields whether it supports it."""
    before = model.config.get_text_config()._attn_implementation
    try:
        model.set_attn_implementation("eager")
        supported = True
    except (ValueError, AttributeError):
        supported = False
    try:
        yield supported
    finally:
        if supported:
            model.set_attn_implementation(before)


def score_spread(case: Case) -> Result:
    """Scores of the policy's responses differ."""
    raw = case.reward.score(*inputs(case))[0]
    scores = adjust(raw, case.reward, case.config.scores)
    spread = float(scores.std(unbiased=False))
    message = f"{len(raw)} responses: mean {float(scores.mean()):.3g}, sd {spread:.3g}"
    if spread <= 1e-4 * max(1e-4, float(scores.abs().max())) or spread < 1e-8:
        return fail(
            f"{message}: all the same", "There is nothing to learn: check the reward model's head, and the clip."
        )
    clip = case.config.scores.clip
    if clip is not None and float((scores.abs() >= clip).float().mean()) >= 0.5:
        return warn(f"{message}; half or more are clipped at ±{clip:g}", "Raise scores.clip, or set scores.scale.")
    if case.reward.model.config.num_labels == 2 and float(raw.abs().min()) > SATURATED:
        return warn(
            f"{message}: it is saturated on all of them", "Train it on such texts as well, or set scores.scale."
        )
    return ok(message)


def order(case: Case) -> Result:
    """Positive texts score above negative ones."""
    if not case.labelled:
        return skip("no labelled texts; pass some with --labels FILE")
    rows = [[r for r in case.labelled if r.label == label][:32] for label in (1, 0)]
    if not all(rows):
        return skip("the labelled texts all have the same label")
    own = case.reward.tokenizer
    scores = []
    for row in (r for side in rows for r in side):
        ids = torch.tensor([own(row.text[:2000], add_special_tokens=case.reward.text is not None)["input_ids"][:64]])
        ids = ids.to(next(case.reward.model.parameters()).device)
        scores.append(case.reward.score(ids, torch.ones_like(ids, dtype=torch.bool))[0])
    combined = torch.cat(scores)
    good, bad = combined[: len(rows[0])], combined[len(rows[0]) :]
    above = float(((good[:, None] > bad).float() + 0.5 * (good[:, None] == bad).float()).mean())
    message = f"a positive text scores above a negative one in {above:.0%} of {good.numel() * bad.numel()} pairs"
    if above < 0.4:
        fix = "Its labels are swapped: name the good one with --positive_label."
        return fail(message, fix)
    if above < 0.6:
        return warn(message, "It hardly separates them: train it longer, or use another.")
    return ok(message)


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), both (B,K): the sampled rollouts in the reward model's tokens."""
    rollouts = rollouts_of(case)
    if case.reward.text is not None:
        rollouts = translate(case.reward, rollouts).rollouts
    return with_suffix(case.reward, rollouts)


def pad_both(ids: Tensor, mask: Tensor, left: int, right: int, fill: int) -> tuple[Tensor, Tensor]:
    """Return (ids, mask) with more padding on the left and on the right."""
    padded = torch.nn.functional.pad(ids, (left, right), value=fill)
    return padded, torch.nn.functional.pad(mask, (left, right), value=False)
