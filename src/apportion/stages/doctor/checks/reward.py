"""Checks of the reward model itself: its head, its padding, its attention, and what its scores say."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from apportion.evidence.text_reward import translate
from apportion.models.loading import load_settings
from apportion.models.reward import adjust, is_decoder, load_reward
from apportion.models.text.token_spans import PolicyText
from apportion.stages.doctor.case import Case
from apportion.stages.doctor.checks.method import reads_attention
from apportion.stages.doctor.checks.policy import finite_weights, rollouts_of, size
from apportion.stages.doctor.checks.probes import ATTENTION, SCORE, joined
from apportion.stages.doctor.findings import fail, graded, ok, skip, warn

Said = tuple[str, str, str]
HEADS = ("score", "classifier")
SATURATED = 12.0  # |logit difference| where a sigmoid is 1 to five digits


def head(case: Case) -> Said:
    """The reward model's weights and head are stored, and the head is not as a new one is drawn."""
    case.reward = load_reward(
        case.config.reward_model,
        dtype=case.config.reward_dtype,
        device=case.config.device,
        pad_token=case.config.pad_token,
        policy=PolicyText(case.tokenizer, case.notes.get("conversations", {})),
        fast_kernels=case.config.fast_kernels,
    )
    model = case.reward.model
    said = size(model)
    found = head_of(model)
    labels = [str(v) for v in (model.config.id2label or {}).values()]
    said = f"{said}; labels {', '.join(labels)}"
    if found is None:
        return ok(f"{said}; head not looked at")
    weight = found.weight.detach().float()
    spread = float(weight.std()) if weight.numel() > 1 else 0.0
    drawn = float(getattr(load_settings("reward_model", case.reward_folder), "initializer_range", 0.0) or 0.0)
    said = f"{said}; head of {weight.numel()} weights, sd {spread:.3g}"
    if case.reward.sd is None and as_drawn(weight, found.bias, drawn):
        said = f"{said}, as a new one is drawn (initializer_range {drawn:g})"
        if case.labelled:  # the order of its scores will tell
            return ok(said)
        return warn(said, "Make sure that it was trained: give labelled texts with --labels, and its order will tell.")
    return ok(said)


def head_of(model: Any) -> nn.Linear | None:
    """Return the layer that gives the score: the last linear one in the head, or None where none is found."""
    heads = [module for name, module in model.named_modules() if name.split(".")[-1] in HEADS]
    layers = [layer for head in heads for layer in head.modules() if isinstance(layer, nn.Linear)]
    return layers[-1] if layers else None


def as_drawn(weight: Tensor, bias: Tensor | None, sd: float) -> bool:
    """Whether `weight` looks like a draw of N(0, sd²) beside a bias of zeros, as a head that never learned.

    Mean, standard deviation and mean |w| are each within 2.5 standard errors of what the normal distribution has;
    training moves all three, and any step moves a bias.
    """
    count = weight.numel()
    if not sd or count < 2 or (bias is not None and bool(bias.any())):
        return False
    # of the mean: sd/√n; of the standard deviation: sd/√(2n); of the mean |w|: sd·√((1 − 2/π)/n)
    mean, spread, size = float(weight.mean()), float(weight.std()), float(weight.abs().mean())
    expected = ((mean, 0.0, 1.0), (spread, 1.0, 0.5), (size, math.sqrt(2 / math.pi), 1 - 2 / math.pi))
    return all(abs(found - sd * value) <= 2.5 * sd * math.sqrt(variance / count) for found, value, variance in expected)


def finite(case: Case) -> Said:
    """Every weight of the reward model is a finite number."""
    return finite_weights(case.reward.model, "reward model")


def padding(case: Case) -> Said:
    """A score does not depend on the pads around its text."""
    ids, mask = inputs(case)
    reward, pad_id = case.reward, case.reward.model.config.get_text_config().pad_token_id
    together = reward.score(ids, mask)[0]
    spread = max(1.0, float(together.std(unbiased=False)))
    found = {"right": reward.score(*beside(ids, mask, 0, 3, pad_id))[0]}
    if is_decoder(reward.model):
        found["left"] = reward.score(*beside(ids, mask, 5, 0, pad_id))[0]
    found["alone"] = torch.cat(
        [reward.score(row[seen][None], seen[seen][None])[0] for row, seen in zip(ids, mask, strict=True)]
    )
    gaps = {side: float((value - together).abs().max()) for side, value in found.items()}
    said = ", ".join(f"{side} {gap:.2g}" for side, gap in gaps.items())
    worst = max(gaps.values(), key=lambda gap: (gap != gap, gap))
    fix = "Scores depend on the batch: check the pad token's embedding and pad_token_id of the reward model."
    return graded(worst / spread, SCORE[next(reward.model.parameters()).dtype], f"differences in score: {said}", fix)


def attention(case: Case) -> Said:
    """The attention that credit reads is the model's own, as eager attention writes it out."""
    if not reads_attention(case):
        return skip("no credit of this run reads it")
    reward = case.reward
    ids, mask = inputs(case)
    _, row, positions = reward.score(ids, mask, attention=True)
    assert row is not None
    with eager(reward.model) as able:
        whole = full_attention(reward.model, ids, mask) if able else None
    if whole is None:
        return ok(f"read for {len(ids)} texts; the model has no eager attention to compare it with")
    expected = whole[torch.arange(len(ids)), :, positions].float().mean(dim=1)
    gap = float((row - expected).abs().max())
    said = f"{gap:.2g} from eager attention at most, over {len(ids)} texts"
    fix = "Use a credit that needs no attention (uniform, sparse) with this reward model."
    return graded(gap, ATTENTION[next(reward.model.parameters()).dtype], said, fix)


@torch.no_grad()
def full_attention(model: Any, ids: Tensor, mask: Tensor) -> Tensor | None:
    """Return the last layer's attention (B,H,K,K) as the model writes it out, or None where it does not."""
    given = {"input_ids": ids, "attention_mask": mask.long()}
    if is_decoder(model):
        given["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
    found = model(**given, output_attentions=True).attentions
    return found[-1] if found else None


@contextlib.contextmanager
def eager(model: Any) -> Iterator[bool]:
    """Have `model` use eager attention inside, and say whether it can."""
    before = model.config.get_text_config()._attn_implementation
    try:
        model.set_attn_implementation("eager")
        able = True
    except (ValueError, AttributeError):
        able = False
    try:
        yield able
    finally:
        if able:
            model.set_attn_implementation(before)


def scores(case: Case) -> Said:
    """Scores of the policy's responses tell them apart."""
    raw = case.reward.score(*inputs(case))[0]
    given = adjust(raw, case.reward, case.config.scores)
    spread = float(given.std(unbiased=False))
    said = f"{len(raw)} responses: mean {float(given.mean()):.3g}, sd {spread:.3g}"
    if spread <= 1e-4 * max(1e-4, float(given.abs().max())) or spread < 1e-8:
        return fail(f"{said}: all the same", "There is nothing to learn: check the reward model's head, and the clip.")
    clip = case.config.scores.clip
    if clip is not None and float((given.abs() >= clip).float().mean()) >= 0.5:
        return warn(f"{said}; half or more are cut off at ±{clip:g}", "Raise scores.clip, or set scores.scale.")
    if case.reward_settings.num_labels == 2 and float(raw.abs().min()) > SATURATED:
        return warn(f"{said}: it is certain of all of them", "Train it on such texts too, or set scores.scale.")
    return ok(said)


def order(case: Case) -> Said:
    """Positive texts score above negative ones."""
    if not case.labelled:
        return skip("no labelled texts known; --labels FILE gives some")
    rows = [[r for r in case.labelled if r.label == label][:32] for label in (1, 0)]
    if not all(rows):
        return skip("the labelled texts are all of one kind")
    own = case.reward.tokenizer
    found = []
    for row in (r for side in rows for r in side):
        ids = torch.tensor([own(row.text[:2000], add_special_tokens=case.reward.text is not None)["input_ids"][:64]])
        ids = ids.to(next(case.reward.model.parameters()).device)
        found.append(case.reward.score(ids, torch.ones_like(ids, dtype=torch.bool))[0])
    every = torch.cat(found)
    good, bad = every[: len(rows[0])], every[len(rows[0]) :]
    above = float(((good[:, None] > bad).float() + 0.5 * (good[:, None] == bad).float()).mean())
    said = f"a positive text scores above a negative one in {above:.0%} of {good.numel() * bad.numel()} pairs"
    if above < 0.4:
        fix = "Its labels are the other way round: name the positive one in id2label of its config.json."
        return fail(said, fix)
    if above < 0.6:
        return warn(said, "It hardly tells them apart: train it longer, or take another.")
    return ok(said)


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), both (B,K), of the sampled rollouts as the reward model reads them."""
    rollouts = rollouts_of(case)
    if case.reward.text is not None:
        rollouts = translate(case.reward, rollouts).rollouts
    return joined(rollouts)


def beside(ids: Tensor, mask: Tensor, left: int, right: int, fill: int) -> tuple[Tensor, Tensor]:
    """Return (ids, mask) with more pads on either side."""
    wider = torch.nn.functional.pad(ids, (left, right), value=fill)
    return wider, torch.nn.functional.pad(mask, (left, right), value=False)
