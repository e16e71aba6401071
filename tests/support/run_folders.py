"""Run folders with plausible numbers, in the stages' format, for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

PLANTED_TOKEN = "</script><script>window.pwned=1</script>"
PLANTED_PROMPT = 'This film <img src=x onerror="window.pwned=2"> was'
PLANTED_SAMPLE = " dull.<script>window.pwned=3</script><svg onload=window.pwned=4>"

PROMPTS = [
    "I watched this film last night and",
    "The acting in the second half",
    "My wife wanted to see it, so",
    "If you have never heard of the director,",
    "There is a scene near the end where",
    "What a strange little movie;",
    "The book was better, but",
    "Nobody expected the sequel",
]
TEXT = (
    " was| a| truly| wonderful| and| moving| film|,| with| great| performances| from| everyone|.|\n\n| I| loved|"
    " every| minute| of| it| because| the| story| felt| real| \u2014| not| perfect|,| but|"
    " warm| and| honest|!| Café| scenes| too"
)
WORDS = TEXT.split("|")


def tokens_of(generator: np.random.Generator, length: int) -> list[str]:
    start = int(generator.integers(0, 6))
    words = [WORDS[(start + i) % len(WORDS)] for i in range(length - 1)]
    return [*words, "<|im_end|>"]


def methods_of(generator: np.random.Generator, score: float, length: int) -> dict[str, list[float]]:
    attention = generator.gamma(0.35, size=length)
    policy = generator.gamma(0.8, size=length)
    sparse = np.zeros(length)
    sparse[-1] = score
    spread = {
        "sparse": sparse,
        "uniform": np.full(length, score / length),
        "attention": 0.8 * score * attention / attention.sum() + 0.2 * sparse,
        "policy_attention": 0.8 * score * policy / policy.sum() + 0.2 * sparse,
    }
    return {name: values.tolist() for name, values in spread.items()}


def rollout(generator: np.random.Generator, step: int, row: int, trained: str) -> dict[str, Any]:
    length = int(generator.integers(22, 36))
    score = float(-0.6 + 2.6 * step / 200 + 0.7 * generator.normal())
    methods = methods_of(generator, score, length)
    kl = 0.02 * generator.normal(size=length) + 0.0003 * step
    credit = np.array(methods[trained])
    reward = credit - 0.05 * kl
    value = np.linspace(0.5 * score, 0.9 * score, length) + 0.05 * generator.normal(size=length)
    advantage = np.cumsum(reward[::-1] * 0.95 ** np.arange(length))[::-1] - value
    per_token = {"credit": credit, "kl": kl, "reward": reward, "advantage": advantage, "value": value}
    tokens = tokens_of(generator, length)
    return {
        "step": step,
        "row": row,
        "prompt": PROMPTS[row % len(PROMPTS)],
        "text": "".join(tokens[:-1]),
        "tokens": tokens,
        "response_ids": list(range(length)),
        "ended": row != 1,
        "score": score,
        **{name: values.tolist() for name, values in per_token.items()},
        "methods": methods,
    }


def metrics_of(generator: np.random.Generator, steps: int, speed: float) -> list[dict[str, float]]:
    rows = []
    for step in range(1, steps + 1):
        done = 1 - np.exp(-speed * step / steps)
        noise = generator.normal(size=12)
        rows.append(
            {
                "step": step,
                "objective/scores": -0.6 + 2.4 * done + 0.22 * noise[0],
                "objective/scores_std": 1.1 + 0.05 * noise[1],
                "objective/kl": 9.0 * done**1.5 + 0.5 * noise[2],
                "objective/entropy": 58 - 14 * done + 1.3 * noise[3],
                "objective/length": 27 + 4 * done + noise[4],
                "objective/rewards": -0.7 + 2.0 * done + 0.22 * noise[5],
                "loss/policy": -0.02 + 0.004 * noise[6],
                "loss/value": 0.6 * np.exp(-3 * done) + 0.05 + 0.02 * abs(noise[7]),
                "policy/approxkl": 0.004 + 0.001 * abs(noise[8]),
                "policy/clipfrac": 0.05 + 0.04 * done + 0.01 * abs(noise[9]),
                "kl/coef": 0.05 * (1 + 0.4 * done),
                "credit/kept_mass": 0.46 + 0.02 * noise[10],
                "credit/max_share": 0.3 + 0.02 * noise[11],
                "time/total": 6.1 + 0.2 * noise[0],
                "memory/rss_mb": 4300.0 + step,
            }
        )
    return rows


def spread(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_rl_run(folder: Path, name: str, *, trained: str, seed: int, speed: float, planted: bool = False) -> Path:
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    config = {
        "stage": "rl",
        "seed": seed,
        "policy": "smollm2",
        "credit": [{trained: {"mix": 0.8}} if trained == "attention" else trained, {"kl_penalty": {"coef": 0.05}}],
        "segments": "tokens",
        "optim": {"lr": 1e-6, "epochs": 4},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    (folder / "status.json").write_text(json.dumps({"stage": "rl", "status": "finished", "name": name}))
    write_lines(folder / "metrics.jsonl", metrics_of(generator, 200, speed))
    rollouts = [rollout(generator, s, row, trained) for s in range(0, 201, 20) for row in range(4)]
    samples = []
    for i, prompt in enumerate(PROMPTS):
        text = "".join(tokens_of(generator, 30)[:-1])
        before = " was on television.\nIt is about a man, and his dog, and his car, and the man is sad."
        after = text + ("" if i % 3 else " It stays with you <3")
        scores = generator.normal(size=4)
        row = {"prompt": prompt, "before": before, "after": after, "kl": 8 + float(scores[3])}
        row |= {"reward_before": -0.9 + 0.2 * i, "reward_after": 1.7 + 0.6 * scores[1]}
        samples.append(row | {"judge_before": 0.35, "judge_after": 0.7 + 0.05 * scores[2]})
    if planted:
        rollouts[0]["prompt"] = PLANTED_PROMPT
        rollouts[0]["tokens"][2] = PLANTED_TOKEN
        samples[0] |= {"prompt": PLANTED_PROMPT, "after": PLANTED_SAMPLE}
    write_lines(folder / "rollouts.jsonl", rollouts)
    write_lines(folder / "samples.jsonl", samples)
    gain = 1.1 * speed
    evaluation = {
        "reward_before": spread(-0.58, 0.11),
        "reward_after": spread(-0.58 + gain, 0.1),
        "judge_before": spread(0.41, 0.05),
        "judge_after": spread(0.41 + 0.1 * speed, 0.045),
        "kl": spread(3.4 * speed, 0.5),
        "distinct2_before": 0.871,
        "distinct2_after": 0.871 - 0.03 * speed,
        "perplexity_before": 14.2,
        "perplexity_after": 14.2 + speed,
        "prompts": 128,
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def write_reward_run(folder: Path, name: str) -> Path:
    generator = np.random.default_rng(5)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("stage: reward\nlr: 1.0e-5\n")
    (folder / "status.json").write_text(json.dumps({"stage": "reward", "status": "finished", "name": name}))
    noise = generator.normal(size=(80, 2))
    rows = [
        {
            "step": i,
            "loss/reward": 0.69 * np.exp(-i / 60) + 0.02 * a,
            "accuracy": 0.82 - 0.32 * np.exp(-i / 20) + 0.02 * b,
        }
        for i, (a, b) in enumerate(noise)
    ]
    write_lines(folder / "metrics.jsonl", rows)
    confidences = np.linspace(0.53, 0.97, 8)
    bins = [
        {"confidence": float(c), "accuracy": float(c - 0.05 * (c - 0.5) + 0.015 * generator.normal()), "count": int(n)}
        for c, n in zip(confidences, [220, 190, 170, 150, 140, 120, 90, 60], strict=True)
    ]
    evaluation = {
        "accuracy": spread(0.811, 0.021),
        "by_length": {
            "8": spread(0.66, 0.04),
            "16": spread(0.74, 0.035),
            "32": spread(0.81, 0.03),
            "64": spread(0.86, 0.03),
        },
        "calibration": bins,
        "ece": 0.021,
        "score_mean": 0.04,
        "score_sd": 1.61,
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder
