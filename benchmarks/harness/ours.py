"""Our side of the comparison, run in a process of its own: `apportion.stages.rl.train.train`, timed from outside.

The run is configured for many steps, so that the learning rate stays constant, and is stopped after the last batch.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from apportion.cli.arguments import value_of
from apportion.config import RLConfig
from apportion.config.schema.section import settings_of, takes_null, takes_text
from apportion.errors import ApportionError, unknown_name
from apportion.system import cpu
from apportion.types import Rollouts
from benchmarks.harness.recorder import Recorder, read_work
from benchmarks.harness.settings import Work

MANY = 100_000  # steps in the settings; the run stops long before


class LastBatch(Exception):
    """Stops the training after the last measured batch, without saving."""


def rl_config(work: Work) -> RLConfig:
    """Return the settings of `apportion rl` for the work: exact lengths, metrics as the only output.

    Raises:
        ConfigError: an override that is no setting, or a value outside its range.
    """
    config = RLConfig(
        policy=work.model,
        reward_model=work.reward,
        prompts=work.prompts,
        output=str(Path(work.folder) / "run"),
        steps=MANY,
        checkpoint_every=0,
        log_rollouts=0,
        compare=[],
        pad_token=work.pad_token,
        seed=work.seed,
        device=work.device,
    )
    config.sampling.batch_size, config.sampling.samples_per_prompt = work.batch, work.samples
    config.sampling.prompt_tokens = [work.prompt_tokens, work.prompt_tokens]
    config.sampling.max_prompt_tokens = max(work.prompt_tokens, config.sampling.max_prompt_tokens)
    config.sampling.max_new_tokens = work.new_tokens
    config.ppo.epochs, config.ppo.mini_batch = work.epochs, work.mini_batch
    config.optim.warmup = 0.0
    critic = work.algorithm == "ppo"
    if work.ours == "full":
        config.algorithm, config.lora.rank, config.optim.lr = work.algorithm, 0, work.lr
        config.optim.eps = 1e-8  # TRL's; 1e-5, ours, damps the small gradients of many weights
        config.ppo.value_model = "reward" if critic else "shared"  # as TRL's begins
    elif not critic:
        config.algorithm = work.algorithm
    for text in work.overrides:
        override(config, text)
    return config


def override(config: Any, text: str) -> None:
    """Set one "section.name=value" of a configuration. Raises ConfigError for a name that is no setting."""
    name, _, value = text.partition("=")
    name, fields = name.strip(), settings_of(type(config))
    if name not in fields:
        raise unknown_name("ours_settings", name, fields)
    section, _, key = name.rpartition(".")
    given = value_of(name, value, text=takes_text(fields[name]), null=takes_null(fields[name]))
    setattr(getattr(config, section) if section else config, key, given)


def monitor(recorder: Recorder) -> None:
    """Time the phases of the loop and count its work by wrapping its functions."""
    from apportion.models.policy import Policy

    rl: Any = importlib.import_module("apportion.stages.rl.train")

    def sampled(rollouts: Rollouts, policy: Policy, prompts: Sequence[Sequence[int]], *args: Any, **more: Any) -> None:
        tokens = int(rollouts.prompt_mask.sum())
        recorder.add(prompts=len(prompts), prompt_tokens=tokens, generated_tokens=int(rollouts.mask.sum()))
        recorder.generated([ids[used].tolist() for ids, used in zip(rollouts.response_ids, rollouts.mask, strict=True)])

    sources = importlib.import_module("apportion.stages.rl.sources")
    recorder.wrap(sources, "sample", "generate", sampled)
    learner = importlib.import_module("apportion.stages.rl.learner")
    recorder.wrap(learner, "score", "score", lambda rollouts, *_: recorder.scored(rollouts.evidence["raw_scores"]))
    recorder.wrap(Policy, "reference_logprobs", "reference")
    recorder.wrap(rl, "train_batch", "update")  # less what was timed inside it
    build = rl.build_method

    def counting(config: RLConfig) -> Any:
        method = build(config)
        terms = method.loss.terms

        def counted(logprobs: Any, rollouts: Any, advantages: Any, mask: Any, segments: Any) -> Any:
            recorder.add(trained_tokens=int(mask.sum()))
            return terms(logprobs, rollouts, advantages, mask, segments)

        return method._replace(loss=method.loss._replace(terms=counted))

    rl.build_method = counting


def metrics(work: Work) -> list[dict[str, float]]:
    """Return the run's own metrics of each timed batch."""
    lines = (Path(work.folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[work.warmup : work.warmup + work.batches]]


def logged(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the medians over batches of the metrics `time/*` and `memory/*`."""
    names = [name for name in rows[0] if name.startswith(("time/", "memory/"))]
    return {name: median(row[name] for row in rows) for name in names}


def main() -> int:
    """Train, measure, write; return 0, or 2 with a message in error.txt."""
    work = read_work()
    cpu.keep_freed_memory()  # as every command does
    try:
        config = rl_config(work)
        from apportion.stages.rl.train import train

        recorder = Recorder(work)
        monitor(recorder)

        def on_step(step: int, steps: int, metrics: dict[str, float]) -> None:
            if recorder.batch_done():
                raise LastBatch

        try:
            train(config, on_step=on_step)
        except LastBatch:
            rows = metrics(work)
            recorder.save(logged=logged(rows), kl=[row["objective/kl"] for row in rows])
    except ApportionError as error:
        (Path(work.folder) / "error.txt").write_text(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
