"""Evaluation: a policy and its initial model generate from the same fresh prompts; both are scored and judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from apportion.config import EvaluateConfig, RewardSpec, SamplingConfig, reward_models, reward_specs
from apportion.data.bad_rows import leaving_out
from apportion.errors import DataError
from apportion.evidence import Models
from apportion.evidence.models import SOURCE_ROW
from apportion.evidence.vine import scores_of
from apportion.generation import sample
from apportion.generation.prompts import encode_prompts, load_prompts
from apportion.intervals import distinct, mean_interval
from apportion.models.loading import context_of, embeddings_of, locate, pick_device, pick_dtype
from apportion.models.policy import Policy, frozen_policy
from apportion.models.pretrained import load_settings
from apportion.models.reward import check_length, load_reward
from apportion.models.text.token_spans import PolicyText
from apportion.models.tokenizers import load_tokenizer
from apportion.rewards import add_models, open_rewards
from apportion.stages.evaluate.judge import fit_judge
from apportion.system import safe_yaml
from apportion.system.progress import activity, counted
from apportion.training.run_folder import RunFolder

BATCH = 32


def evaluate(
    config: EvaluateConfig, *, part: str = "evaluate_test", on_progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Write prompts.jsonl, samples.jsonl and evaluation.json into the run folder and return the figures.

    Rewards, judge and KL are {mean, low, high} with normal 95% intervals over prompts; `kl` is in nats a sequence, on
    the trained policy's samples; perplexities are under the initial model. The judge scores only the response. Samples
    are those of the first prompts in order.

    Raises:
        DataError: the folder is not a finished `apportion rl` run.
    """
    run, settings = _open(config)
    sampling = SamplingConfig(**settings["sampling"])
    rewards = open_rewards(_specs(settings))
    with leaving_out(run.path, config.skip_bad_rows, "evaluate_bad_rows.jsonl") as bad:
        columns = frozenset[str]() if rewards is None else rewards.wanted
        loaded = load_prompts(config.prompts, part, bad, columns, config.split)
        if rewards is not None:
            rewards.check_columns([prompt.columns for prompt in loaded])
        folder = locate("policy", settings["policy"])
        context = context_of(folder)
        embeddings = embeddings_of(folder, load_settings("policy", folder))
        tokenizer = load_tokenizer("run", str(run.path / "final"))
        if all(isinstance(prompt.content, str) for prompt in loaded):  # a run on conversations may be tried on texts
            sampling = sampling.model_copy(update={"chat_template_kwargs": None})
        encoded = encode_prompts(loaded, tokenizer, sampling, config.seed, context, bad, config.count, embeddings)
    prompts = encoded.rows
    policy_text = PolicyText(tokenizer, encoded.conversations, cuts=sampling.stop == "eos")
    loading = {"dtype": "float32", "device": config.device, "pad_token": settings["pad_token"]}
    loading["fast_kernels"] = settings.get("fast_kernels", True)
    stored = settings.get("positive_label")
    loading["positive"] = config.positive_label or (None if stored is None else str(stored))
    found = {
        one.source: load_reward(one.source, **loading, policy=policy_text) for one in reward_models(_specs(settings))
    }
    for reward in found.values():
        check_length("reward_model", reward, prompts, sampling.max_new_tokens)
        for line in reward.notes:
            on_progress(f"note: {line}.")
    add_models(rewards, found)
    policy, start = _policies(config, run, settings, sampling)
    scorer = Models(start, next(iter(found.values()), None), columns=encoded.columns)
    scorer.conversations, scorer.rewards = encoded.conversations, rewards
    on_progress(f"generating from {len(prompts)} fresh prompts, before and after training")
    before = _generate(start, start, scorer, prompts, sampling, config.seed)
    after = _generate(policy, start, scorer, prompts, sampling, config.seed)
    figures: dict[str, Any] = {}
    if config.judge:
        on_progress("scoring with the judge")
        with activity("fitting the judge"):
            judge = fit_judge("imdb")
        for sample_set in (before, after):
            probabilities = judge.probability([row["text"] for row in sample_set]).tolist()
            for row, p in zip(sample_set, probabilities, strict=True):
                row["judge"] = p
    for name, rows in (("before", before), ("after", after)):
        figures |= _summary(name, rows, config.judge)
    figures |= {"kl": mean_interval([row["kl"] for row in after]), "prompts": len(prompts), "seed": config.seed}
    used = [{"prompt": row["prompt"], "ids": ids} for row, ids in zip(before, prompts, strict=True)]
    _rewrite(run, "prompts.jsonl", used)
    _rewrite(run, "samples.jsonl", [_pair(b, a) for b, a in zip(before, after, strict=True)])
    run.write_json("evaluation.json", figures)
    return figures


def _rewrite(run: RunFolder, name: str, rows: list[dict[str, Any]]) -> None:
    (run.path / name).unlink(missing_ok=True)
    run.logs.append(name, rows)


def _open(config: EvaluateConfig) -> tuple[RunFolder, dict[str, Any]]:
    run = RunFolder(Path(config.run).expanduser(), "rl")
    stored = run.path / "config.yaml"
    is_rl = run.read("status.json").get("stage") == "rl"
    if not is_rl or not stored.is_file() or not run.finished or not (run.path / "final").is_dir():
        fix = "Train one with `apportion rl`, or point to its folder."
        raise DataError("run", config.run, "the folder of a finished `apportion rl` run", fix)
    run.refuse_links()
    return run, _settings(stored)


def _settings(stored: Path) -> dict[str, Any]:
    """Return the settings of the run. Raises DataError where they are damaged."""
    try:
        settings: dict[str, Any] = safe_yaml.load(stored.read_text(encoding="utf-8"))
        SamplingConfig(**settings["sampling"])
        if not isinstance(settings["policy"], str) or "pad_token" not in settings:
            raise ValueError("no policy or pad_token")
        _specs(settings)
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        got = f"{stored} ({' '.join(str(error).split())[:200]})"
        raise DataError("run", got, "the settings of an `apportion rl` run", "Use another run.") from error
    return settings


def _specs(settings: dict[str, Any]) -> list[RewardSpec]:
    """Return the rewards of the run. Raises ConfigError (a ValueError) where they are damaged."""
    return reward_specs(settings["reward_model"], settings.get("rewards"))


def _policies(
    config: EvaluateConfig, run: RunFolder, settings: dict[str, Any], sampling: SamplingConfig
) -> tuple[Policy, Policy]:
    """Return (trained policy, initial policy), for sampling and log-probabilities."""
    device = pick_device(config.device)
    folder = str(run.path / "final")
    loading: dict[str, Any] = {"dtype": pick_dtype(config.dtype, device), "device": device, "stop": sampling.stop}
    loading |= {"pad_token": settings["pad_token"], "temperature": sampling.temperature}
    loading["fast_kernels"] = settings.get("fast_kernels", True)
    tokenizer = load_tokenizer("run", folder)
    trained = frozen_policy("run", folder, tokenizer, **loading)
    start = frozen_policy("run", locate("policy", settings["policy"]), tokenizer, **loading)
    return trained, start


@torch.no_grad()
def _generate(
    policy: Policy, start: Policy, scorer: Models, prompts: list[list[int]], sampling: SamplingConfig, seed: int
) -> list[dict[str, Any]]:
    """Return one record a prompt: text, ids, reward, KL to the initial policy, and its log-likelihood.

    The reward is that of the run, as it was given: neither centred nor scaled, normalised or clipped.
    """
    generator = torch.Generator(device=policy.device).manual_seed(seed)
    one = sampling.model_copy(update={"samples_per_prompt": 1})
    rows: list[dict[str, Any]] = []
    firsts = range(0, len(prompts), BATCH)
    for first in counted(firsts, "generating from fresh prompts", len(firsts), unit="batch"):
        rollouts = sample(policy, prompts[first : first + BATCH], one, generator)
        if scorer.columns:
            rollouts = rollouts.with_evidence(**{SOURCE_ROW: rollouts.group + first})
        scores = scores_of(scorer, rollouts).tolist()
        own = policy.forward(rollouts, values=False).logprobs.sum(dim=1)
        starts = start.forward(rollouts, values=False).logprobs.sum(dim=1)
        for i, score in enumerate(scores):
            ids = rollouts.response_ids[i][rollouts.mask[i]].tolist()
            rows.append(
                {
                    "prompt": policy.tokenizer.decode(prompts[first + i]),
                    "text": policy.tokenizer.decode(ids, skip_special_tokens=True),
                    "ids": ids,
                    "reward": score,
                    "kl": float(own[i] - starts[i]),
                    "start_logprob": float(starts[i]),
                }
            )
    return rows


def _summary(name: str, rows: list[dict[str, Any]], judged: bool) -> dict[str, Any]:
    tokens = sum(len(row["ids"]) for row in rows)
    figures = {
        f"reward_{name}": mean_interval([row["reward"] for row in rows]),
        f"distinct2_{name}": distinct([row["ids"] for row in rows]),
        f"perplexity_{name}": math.exp(-sum(row["start_logprob"] for row in rows) / max(1, tokens)),
        f"length_{name}": tokens / len(rows),
    }
    return figures | ({f"judge_{name}": mean_interval([row["judge"] for row in rows])} if judged else {})


def _pair(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    pair = {"prompt": before["prompt"], "before": before["text"], "after": after["text"], "kl": after["kl"]}
    for key in ("reward", "judge"):
        if key in before:
            pair |= {f"{key}_before": before[key], f"{key}_after": after[key]}
    return pair
