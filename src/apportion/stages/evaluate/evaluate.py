"""Evaluation: a policy and its start write on the same fresh prompts; both are scored, judged and compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from apportion.config import EvaluateConfig, SamplingConfig
from apportion.data.bad_rows import leaving_out
from apportion.errors import DataError
from apportion.evidence.reward import reward_evidence
from apportion.generation import sample
from apportion.generation.prompts import conversations, load_prompts, tokenize
from apportion.intervals import distinct, mean_interval
from apportion.models.loading import context_of, load_causal, load_tokenizer, locate, pick_device, pick_dtype
from apportion.models.policy import Policy, banned_ids
from apportion.models.reward import RewardModel, load_reward
from apportion.models.text.token_spans import PolicyText
from apportion.stages.evaluate.judge import fit_judge
from apportion.system import safe_yaml
from apportion.training.run_folder import RunFolder

Tell = Callable[[str], None]
BATCH = 32


def evaluate(config: EvaluateConfig, *, part: str = "evaluate_test", tell: Tell = lambda line: None) -> dict[str, Any]:
    """Write prompts.jsonl, samples.jsonl and evaluation.json into the run folder and return what was measured.

    Rewards, judge and KL come as {mean, low, high} with normal 95% intervals over prompts; `kl` is the policy's, in
    nats a sequence, on its own samples; perplexities are the start's, of each one's samples. The judge reads the
    response only. Samples are the first prompts in order, not chosen ones.

    Raises:
        DataError: the folder is not a finished `apportion rl` run.
    """
    run, settings = _open(config)
    sampling = SamplingConfig(**settings["sampling"])
    with leaving_out(run.path, config.skip_bad_rows, "evaluate_bad_rows.jsonl") as bad:
        texts = load_prompts(config.prompts, part, bad)[: config.count]
    context = context_of(locate("policy", settings["policy"]))
    tokenizer = load_tokenizer("run", str(run.path / "final"))
    prompts = tokenize(texts, tokenizer, sampling, config.seed, context)
    reads = PolicyText(tokenizer, conversations(texts, prompts, sampling))
    loading = {"dtype": "float32", "device": config.device, "pad_token": settings["pad_token"]}
    loading["fast_kernels"] = settings.get("fast_kernels", True)
    reward = load_reward(settings["reward_model"], **loading, policy=reads)
    policy, start = _policies(config, run, settings, sampling)
    tell(f"writing on {len(prompts)} fresh prompts, before and after")
    before = _written(start, start, reward, prompts, sampling, config.seed)
    after = _written(policy, start, reward, prompts, sampling, config.seed)
    found: dict[str, Any] = {}
    if config.judge:
        tell("asking the judge")
        judge = fit_judge("imdb")
        for sample_set in (before, after):
            probabilities = judge.probability([row["text"] for row in sample_set]).tolist()
            for row, p in zip(sample_set, probabilities, strict=True):
                row["judge"] = p
    for name, rows in (("before", before), ("after", after)):
        found |= _summary(name, rows, config.judge)
    found |= {"kl": mean_interval([row["kl"] for row in after]), "prompts": len(prompts), "seed": config.seed}
    used = [{"prompt": row["prompt"], "ids": ids} for row, ids in zip(before, prompts, strict=True)]
    _rewrite(run, "prompts.jsonl", used)
    _rewrite(run, "samples.jsonl", [_pair(b, a) for b, a in zip(before, after, strict=True)])
    run.write_json("evaluation.json", found)
    return found


def _rewrite(run: RunFolder, name: str, rows: list[dict[str, Any]]) -> None:
    (run.path / name).unlink(missing_ok=True)
    run.logs.append(name, rows)


def _open(config: EvaluateConfig) -> tuple[RunFolder, dict[str, Any]]:
    run = RunFolder(Path(config.run).expanduser(), "rl")
    stored = run.path / "config.yaml"
    ours = run.read("status.json").get("stage") == "rl"
    if not ours or not stored.is_file() or not run.finished or not (run.path / "final").is_dir():
        fix = "Train one with `apportion rl`, or point to its folder."
        raise DataError("run", config.run, "the folder of a finished `apportion rl` run", fix)
    run.refuse_links()
    return run, _settings(stored)


def _settings(stored: Path) -> dict[str, Any]:
    """Return the settings of the run. Raises DataError where they are damaged."""
    try:
        found: dict[str, Any] = safe_yaml.load(stored.read_text(encoding="utf-8"))
        SamplingConfig(**found["sampling"])
        if not all(isinstance(found[name], str) for name in ("policy", "reward_model")) or "pad_token" not in found:
            raise ValueError("no policy, reward_model or pad_token")
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        got = f"{stored} ({' '.join(str(error).split())[:200]})"
        raise DataError("run", got, "the settings of an `apportion rl` run", "Use another run.") from error
    return found


def _policies(
    config: EvaluateConfig, run: RunFolder, settings: dict[str, Any], sampling: SamplingConfig
) -> tuple[Policy, Policy]:
    """Return (policy, start), both to be sampled and read only."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    folder = str(run.path / "final")
    tokenizer = load_tokenizer("run", folder)
    banned = banned_ids(tokenizer, sampling.stop)
    fast, folders = settings.get("fast_kernels", True), (folder, locate("policy", settings["policy"]))
    models = [load_causal("run", where, dtype, device, fast_kernels=fast) for where in folders]
    trained, start = (Policy(model, tokenizer, banned, temperature=sampling.temperature) for model in models)
    return trained, start


@torch.no_grad()
def _written(
    writer: Policy, start: Policy, reward: RewardModel, prompts: list[list[int]], sampling: SamplingConfig, seed: int
) -> list[dict[str, Any]]:
    """Return one record a prompt: text, ids, reward, KL to the start and the start's log-likelihood."""
    generator = torch.Generator(device=writer.device).manual_seed(seed)
    one = SamplingConfig(**{**vars(sampling), "samples_per_prompt": 1})
    rows: list[dict[str, Any]] = []
    for first in range(0, len(prompts), BATCH):
        rollouts = sample(writer, prompts[first : first + BATCH], one, generator)
        scores = reward_evidence(reward, rollouts, frozenset({"scores"}))["scores"].tolist()
        mine = writer.forward(rollouts, values=False).logprobs.sum(dim=1)
        starts = start.forward(rollouts, values=False).logprobs.sum(dim=1)
        for i, score in enumerate(scores):
            ids = rollouts.response_ids[i][rollouts.mask[i]].tolist()
            rows.append(
                {
                    "prompt": writer.tokenizer.decode(prompts[first + i]),
                    "text": writer.tokenizer.decode(ids, skip_special_tokens=True),
                    "ids": ids,
                    "reward": score,
                    "kl": float(mine[i] - starts[i]),
                    "start_logprob": float(starts[i]),
                }
            )
    return rows


def _summary(name: str, rows: list[dict[str, Any]], judged: bool) -> dict[str, Any]:
    tokens = sum(len(row["ids"]) for row in rows)
    found = {
        f"reward_{name}": mean_interval([row["reward"] for row in rows]),
        f"distinct2_{name}": distinct([row["ids"] for row in rows]),
        f"perplexity_{name}": math.exp(-sum(row["start_logprob"] for row in rows) / max(1, tokens)),
        f"length_{name}": tokens / len(rows),
    }
    return found | ({f"judge_{name}": mean_interval([row["judge"] for row in rows])} if judged else {})


def _pair(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    pair = {"prompt": before["prompt"], "before": before["text"], "after": after["text"], "kl": after["kl"]}
    for key in ("reward", "judge"):
        if key in before:
            pair |= {f"{key}_before": before[key], f"{key}_after": after[key]}
    return pair
