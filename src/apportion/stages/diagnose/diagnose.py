"""Diagnosis: how well each credit method's policy gradient agrees with the true one, for a policy and a reward model.

Many rollouts of each prompt are scored once, and all methods apportion the same ones. The gradient is that of a d×d map
on the last hidden states, which needs no backward pass: ∇ log π(a_t) = v_t h_tᵀ with v_t = Wᵀ(e_a − p)/τ.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apportion import credit
from apportion.compatibility import check_diagnosis
from apportion.config import DiagnoseConfig, ScoreConfig, to_dict
from apportion.data.bad_rows import leaving_out
from apportion.errors import ConfigError
from apportion.evidence import Models, plan
from apportion.evidence.models import SOURCE_ROW
from apportion.evidence.process import prompts_for
from apportion.evidence.scoring import score
from apportion.generation import sample
from apportion.generation.prompts import encode_prompts
from apportion.masking import Moments, last_index
from apportion.models.loading import context_of, embeddings_of, locate, pick_device, pick_dtype
from apportion.models.policy import Policy, frozen_policy, response_logits
from apportion.models.pretrained import load_settings
from apportion.models.reward import check_length, check_width, load_reward
from apportion.models.text.render import embedding_count
from apportion.models.text.token_spans import PolicyText
from apportion.models.tokenizers import load_tokenizer
from apportion.stages.attention import check_attention
from apportion.stages.diagnose import gradients
from apportion.stages.diagnose.candidates import Candidate, candidates
from apportion.stages.diagnose.gradients import Gradients, Interval
from apportion.training.run_folder import RunFolder
from apportion.types import Rollouts

ProgressCallback = Callable[[int, int], None]  # (done, total)
SCORED = frozenset({"scores"})  # the evidence of every method
ROWS = 32  # rollouts whose (ROWS,T,V) probabilities are in memory at a time, and whose scoring is timed
TIMED = 5  # passes over one batch; a method's extra time is their median


class Block(NamedTuple):
    """Measurements of one batch of rollouts, by method; U units (prompts) and B rows.

    gradients {name: (U,d·e)}, squares {name: (U,)} (mean squared norm of a row's), stop {name: (U,)} (the gradient of
    the logits of the ids that end a response), ends {name: (B,)} (the last token's return), and lengths, scores (B,).
    "true" is among the names.
    """

    gradients: dict[str, Tensor]
    squares: dict[str, Tensor]
    stop: dict[str, Tensor]
    ends: dict[str, Tensor]
    lengths: Tensor
    scores: Tensor


def diagnose(
    config: DiagnoseConfig,
    *,
    fresh: bool = False,
    on_progress: ProgressCallback = lambda done, count: None,
    warn: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compare the methods, write diagnosis.json into the run folder, and return its content.

    `warn` is called with what the user should know of the reward model, a line each.

    Raises:
        ConfigError, ModelError, DataError, ScoreError: each names the fix.
    """
    check_diagnosis(config)
    methods = candidates(config.methods, config.lam)
    run = RunFolder.open(config.output, "diagnose", to_dict(config), fresh=fresh)
    if run.finished:
        return run.read("diagnosis.json")
    with run.record_failure():
        models, prompts = open_models(config, methods)
        steps = 2 * -(-len(prompts) // _prompts_a_block(config))  # every block is sampled, then measured
        for line in models.reward_model.notes:
            warn(f"warning: reward model: {line}.")
        needs = frozenset[str]().union(*(m.needs for m in methods.values()))
        scored: list[Rollouts] = []
        blocks: list[Block] = []
        sums: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in methods}
        costs: dict[str, dict[str, float]] = {}
        for rollouts in _rollouts(config, models, prompts):
            if not costs:
                costs = {name: _cost(models, rollouts, method.needs) for name, method in methods.items()}
            scored.append(score(models, rollouts, needs, ScoreConfig(), SCORED))
            on_progress(len(scored), steps)
        # a run whitens batches of many prompts, and a block has few: these are the moments of all
        whitening = {name: method.whitening(scored) for name, method in methods.items()}
        for rollouts in scored:
            blocks.append(block(models.policy, rollouts, methods, config.width, whitening))
            _add_stats(sums, methods, rollouts)
            on_progress(len(scored) + len(blocks), steps)
        comparable = frozenset(name for name, method in methods.items() if method.in_score_units)
        result = summarise(blocks, config, comparable) | {"settings": {"lam": config.lam, "seed": config.seed}}
        for name, measured in result["methods"].items():
            measured |= costs[name] | {k: total / max(count, 1) for k, (total, count) in sums[name].items()}
        run.write_json("diagnosis.json", result)
        run.write_status("finished")
    return result


def open_models(config: DiagnoseConfig, methods: Mapping[str, Candidate]) -> tuple[Models, list[list[int]]]:
    """Return the models, for sampling and scoring, and the prompts' ids.

    Raises:
        ModelError: as the loaders do, or a model cannot give attention that a method needs.
    """
    folder, reward_folder = locate("policy", config.policy), locate("reward_model", config.reward_model)
    needs = frozenset[str]().union(*(method.needs for method in methods.values()))
    with leaving_out(Path(config.output).expanduser(), config.skip_bad_rows) as bad:
        loaded = prompts_for(needs, config.prompts, bad, config.split)
        check_count(len(loaded))
        tokenizer = load_tokenizer("policy", folder, config.pad_token)
        context = context_of(folder)
        embeddings = embeddings_of(folder, load_settings("policy", folder))
        prompts = encode_prompts(
            loaded, tokenizer, config.sampling, config.seed, context, bad, config.count, embeddings
        )
    check_count(len(prompts.rows))
    device = pick_device(config.device)
    policy = frozen_policy(
        "policy", folder, tokenizer, dtype=pick_dtype(config.dtype, device), device=device, pad_token=config.pad_token,
        stop=config.sampling.stop, temperature=config.sampling.temperature,
    )  # fmt: skip
    policy.reference = policy.model
    policy_text = PolicyText(tokenizer, prompts.conversations, cuts=config.sampling.stop == "eos")
    settings: dict[str, Any] = {"dtype": config.reward_dtype, "device": config.device, "pad_token": config.pad_token}
    reward = load_reward(reward_folder, **settings, policy=policy_text, positive=config.positive_label)
    check_width("reward_model", reward, tokenizer, embedding_count(policy.model), prompts.rows)
    check_length("reward_model", reward, prompts.rows, config.sampling.max_new_tokens)
    generator = torch.Generator(device=device).manual_seed(config.seed)
    segment = next((m.segment for m in methods.values() if "vine_values" in m.needs), None)
    models = Models(policy, reward, segment, config.sampling, generator, columns=prompts.columns)
    check_attention(models, needs)
    return models, prompts.rows


def check_count(prompts: int) -> None:
    """Raise ConfigError for fewer than two prompts."""
    if prompts < 2:
        expected = "at least 2 prompts: intervals are taken over prompts"
        raise ConfigError("prompts", f"{prompts} prompts", expected, "Give more of them.")


def _prompts_a_block(config: DiagnoseConfig) -> int:
    return max(1, config.sampling.batch_size // config.samples)


def _rollouts(config: DiagnoseConfig, models: Models, prompts: list[list[int]]) -> Iterator[Rollouts]:
    """Yield unscored rollouts, every sample of a prompt in one block."""
    assert models.generator is not None
    sampling = config.sampling.model_copy(update={"samples_per_prompt": config.samples})
    step = _prompts_a_block(config)
    for first in range(0, len(prompts), step):
        rollouts = sample(models.policy, prompts[first : first + step], sampling, models.generator)
        yield rollouts.with_evidence(**{SOURCE_ROW: rollouts.group + first}) if models.columns else rollouts


@torch.no_grad()
def block(
    policy: Policy,
    rollouts: Rollouts,
    methods: Mapping[str, Candidate],
    width: int,
    whitening: Mapping[str, Moments | None] | None = None,
) -> Block:
    """Return the measurements of scored `rollouts` for every method; see `Block`.

    Args:
        whitening: the moments of each whitened method's advantages; absent ones are those of these rollouts.
    """
    left, right, stop = score_functions(policy, rollouts, width)
    assert rollouts.scores is not None
    centred = gradients.centred_scores(rollouts.scores, rollouts.group)
    advantages = {"true": torch.where(rollouts.mask, centred[:, None], 0.0)}
    last = last_index(rollouts.mask).clamp_min(0)[:, None]
    ends = {"true": rollouts.scores}
    for name, method in methods.items():
        advantages[name], rewards = method.advantages(rollouts, (whitening or {}).get(name))
        ends[name] = rewards.gather(1, last).squeeze(1)
    _, unit = rollouts.group.unique(return_inverse=True)
    return Block(
        {name: _by_unit(a, left, right, unit) for name, a in advantages.items()},
        {name: _means(gradients.row_squares(a, left, right), unit) for name, a in advantages.items()},
        {} if stop is None else {name: _means((a * stop).sum(dim=1), unit) for name, a in advantages.items()},
        ends,
        rollouts.mask.sum(dim=1).float(),
        rollouts.scores,
    )


def score_functions(policy: Policy, rollouts: Rollouts, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (v (B,T,d), h (B,T,d), EOS (B,T) or None), all 0 off the mask: the factors of each token's ∇ log π.

    v h^T is the gradient of a map on the last hidden states, and EOS that of the logits of the ids that end a response,
    summed, None where no such id is ever sampled. States wider than `width` are projected at random, which preserves
    inner products in expectation.
    """
    parts = [_score_functions(policy, rollouts.select(r), width) for r in _rows(rollouts)]
    left, right = (torch.cat([part[i] for part in parts]) for i in range(2))
    return left, right, torch.cat([p[2] for p in parts]) if sampled_ends(policy) else None


def sampled_ends(policy: Policy) -> list[int]:
    """Return the ids that end a response and can be sampled."""
    return [i for i in policy.ends if i not in policy.banned]


def _rows(rollouts: Rollouts) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = torch.arange(len(rollouts), device=rollouts.mask.device).split(ROWS)
    return parts


def _score_functions(policy: Policy, rollouts: Rollouts, width: int) -> tuple[Tensor, Tensor, Tensor]:
    logits, states = response_logits(policy.model, rollouts)
    probabilities = policy.allowed(logits[:, :-1]).softmax(dim=-1)
    gap = probabilities.neg_().scatter_add_(
        -1, rollouts.response_ids[..., None], torch.ones_like(rollouts.logprobs)[..., None]
    )
    gap = gap.masked_fill_(~rollouts.mask[..., None], 0.0)
    weight = policy.model.get_output_embeddings().weight
    left = (gap.to(weight.dtype) @ weight).float() / policy.temperature
    right = torch.where(rollouts.mask[..., None], states[:, :-1].float(), 0.0)
    stop = gap[..., sampled_ends(policy)].sum(dim=-1)
    return projected(left, width, 0), projected(right, width, 1), stop


def projected(states: Tensor, width: int, seed: int) -> Tensor:
    """Return `states` (…,d) unchanged when d <= width, else times a random (d,width) of variance 1/width."""
    size = states.shape[-1]
    if size <= width:
        return states
    generator = torch.Generator().manual_seed(seed)
    projected: Tensor = states @ (torch.randn(size, width, generator=generator) / width**0.5).to(states)
    return projected


def _by_unit(advantages: Tensor, left: Tensor, right: Tensor, unit: Tensor) -> Tensor:
    """Return the mean gradient (U,d·e) of each unit's rows."""
    rows = []
    for number in range(int(unit.max()) + 1):
        mine = unit == number
        weighted = (advantages[mine][..., None] * left[mine]).flatten(0, 1)
        rows.append((weighted.T @ right[mine].flatten(0, 1)).flatten() / mine.sum())
    return torch.stack(rows).cpu()


def _means(values: Tensor, unit: Tensor) -> Tensor:
    """Return the mean (U,) of `values` (B,) over each unit."""
    count = torch.bincount(unit)
    return (torch.zeros(len(count), device=values.device).index_add_(0, unit, values) / count).cpu()


def _add_stats(
    sums: dict[str, dict[str, tuple[float, float]]], methods: Mapping[str, Candidate], rollouts: Rollouts
) -> None:
    """Add a block's credit statistics (kept mass, entropy, …) to `sums`."""
    for name, method in methods.items():
        if method.credit.stats is None:
            continue
        rewards, _ = credit.apply(method.credit, rollouts)
        for key, (total, count) in method.credit.stats(rollouts, rewards, rewards).items():
            before = sums[name].get(key, (0.0, 0.0))
            sums[name][key] = (before[0] + float(total), before[1] + float(count))


def _cost(models: Models, rollouts: Rollouts, needs: frozenset[str]) -> dict[str, float]:
    """Return {extra_ms, extra_forwards} of `needs` over plain scoring of one batch: median of paired passes."""
    if not needs:
        return {"extra_ms": 0.0, "extra_forwards": 0, "extra_backwards": 0}
    extra = []
    some = rollouts.select(torch.arange(min(ROWS, len(rollouts)), device=rollouts.mask.device))
    for _ in range(TIMED):
        times = []
        for wanted in (frozenset[str](), needs):
            start = time.perf_counter()
            score(models, some, wanted, ScoreConfig(), SCORED)
            times.append(time.perf_counter() - start)
        extra.append(1000 * (times[1] - times[0]))
    plain, more = plan(SCORED), plan(SCORED | needs)
    cost = {"extra_ms": float(torch.tensor(extra).median())}
    for kind in ("forwards", "backwards"):
        cost[f"extra_{kind}"] = sum(getattr(p, kind) for p, _ in more) - sum(getattr(p, kind) for p, _ in plain)
    return cost


def summarise(blocks: list[Block], config: DiagnoseConfig, comparable: frozenset[str]) -> dict[str, Any]:
    """Return the measured figures of every method, with 95% intervals over units, and the recommendation.

    Differences from the true gradient are given for the methods in `comparable`; the norm of the others has no meaning.
    """
    names = list(blocks[0].gradients)
    sampled = Gradients(
        {name: torch.cat([b.gradients[name] for b in blocks]) for name in names},
        {name: torch.cat([b.squares[name] for b in blocks]) for name in names},
    )
    lengths, scores = (torch.cat([getattr(b, key) for b in blocks]).cpu() for key in ("lengths", "scores"))
    stops = {name: torch.cat([b.stop[name] for b in blocks]) for name in blocks[0].stop}
    methods: dict[str, dict[str, Any]] = {}
    for name in names:
        if name == "true":
            continue
        ends = torch.cat([b.ends[name] for b in blocks]).cpu()
        methods[name] = figures(sampled, name, config.batch) | {
            "length_correlation": gradients.correlation(ends, lengths),
            "stop": gradients.mean_over_units(stops[name]) if stops else None,
            "stop_bias": gradients.mean_over_units(stops[name] - stops["true"]) if stops else None,
        }
        methods[name] |= {} if name in comparable else dict.fromkeys(("bias", "stop_bias"))
    for measured in methods.values():
        measured["verdict"] = verdict(measured)
    return {
        "methods": methods,
        "true_snr": sampled.interval(lambda w: sampled.snr("true", w, config.batch)),
        "true_stop": gradients.mean_over_units(stops["true"]) if stops else None,
        "score_length_correlation": gradients.correlation(scores, lengths),
        "rollouts": len(scores),
        "prompts": sampled.count,
        "samples": config.samples,
        "batch": config.batch,
        **recommend(methods),
    }


def figures(sampled: Gradients, name: str, batch: int) -> dict[str, Interval]:
    """Return cosine, relative bias, and signal-to-noise ratio (total and along the true gradient) of method `name`."""
    return {
        "cosine": sampled.interval(lambda w: sampled.cosine(name, w)),
        "bias": sampled.interval(lambda w: sampled.bias(name, w)),
        "snr": sampled.interval(lambda w: sampled.snr(name, w, batch)),
        "useful_snr": sampled.interval(lambda w: sampled.useful(name, w, batch)),
    }


def verdict(measured: Mapping[str, Any]) -> str:
    """Return the conclusion from the figures of one method, in words."""
    parts = [f"its expected gradient {gradients.direction(measured['cosine'])}"]
    bias = measured["stop_bias"]
    if bias is not None and bias["low"] is not None and (bias["low"] > 0 or bias["high"] < 0):
        parts.append("it rewards stopping early" if bias["low"] > 0 else "it rewards longer responses")
    return "; ".join(parts)


def recommend(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, str | None]:
    """Return {recommended, why}: the most signal along the true gradient among methods with a similar direction.

    Nothing is recommended when no method's direction is resolved, and ties are reported.
    """
    fit = {
        name: m["useful_snr"]
        for name, m in methods.items()
        if m["useful_snr"]["mean"] is not None and gradients.direction(m["cosine"]) in gradients.VERDICTS[:2]
    }
    if not fit:
        why = "No method's gradient is shown to agree with the true one within the noise: give more prompts or samples."
        return {"recommended": None, "why": why}
    best = max(fit, key=lambda name: fit[name]["mean"])
    rivals = [name for name in fit if name != best and fit[name]["high"] >= fit[best]["low"]]
    value = fit[best]
    why = f"most signal along the true gradient: {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}] a batch"
    tie = f"; not distinguishable from {', '.join(rivals)}" if rivals else ""
    return {"recommended": best, "why": why + tie}
