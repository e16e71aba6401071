"""The answers of everyone: each model samples as `apportion sample` does, one model in memory; others are given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apportion.config import SampleConfig
from apportion.data.conversations import Conversation
from apportion.errors import DataError
from apportion.stages.evaluate.comparison.given import Answers, encode_answers, given_answers
from apportion.stages.evaluate.comparison.opening import Comparison
from apportion.stages.evaluate.comparison.store import read_lines, stored
from apportion.stages.sample.sample import sample_answers
from apportion.system.progress import Activity, activity
from apportion.training.run_folder import RunFolder
from apportion.training.session import ProgressCallback

PROMPTS, FOLDER = "prompts.jsonl", "answers"


def all_answers(comparison: Comparison, on_step: ProgressCallback) -> dict[str, Answers]:
    """Return the answers of everyone by name. Models sample into answers/NAME, where finished ones are found again.

    Args:
        on_step: called after each batch with (prompts answered by all models so far, all of them, {}).

    Raises:
        DataError: other prompts than those that an interrupted comparison has answers to.
        Interrupted: a signal came; all finished batches are kept.
    """
    prompts = json.loads(json.dumps([_prompt(comparison, i) for i in range(len(comparison.contents))]))
    if stored(comparison.run, PROMPTS, lambda: prompts) != prompts:
        got = f"{comparison.config.prompts}, whose prompts are not those of {comparison.run.path / PROMPTS}"
        fix = "Choose another --output, or pass --fresh to start over with the new prompts."
        raise DataError("prompts", got, "the prompts with which the comparison was begun", fix)
    models = [one for one in comparison.everyone if one.is_model]
    count, found = len(comparison.contents), dict[str, Answers]()
    with activity("sampling", len(models) * count, unit="answered prompt") as entry:
        for place, one in enumerate(models):
            if RunFolder(comparison.run.path / FOLDER / one.name, "sample").finished:
                entry.start += count  # they say nothing of the pace
            report = _Report(comparison, entry, place * count, on_step)
            with activity(f"{place + 1}/{len(models)} {one.name}"):
                path = sample_answers(sample_config(comparison, one.name), on_step=report)
            report(count, count, {})
            found[one.name] = _sampled(comparison, one.name, path)
    for name, rows in comparison.given.items():
        found[name] = given_answers(rows, comparison.prompts.rows, comparison.tokenizer)
    return {one.name: found[one.name] for one in comparison.everyone}


class _Report:
    """Progress of one model's sampling as that of all; see `ProgressCallback`."""

    def __init__(self, comparison: Comparison, entry: Activity, before: int, on_step: ProgressCallback) -> None:
        self._run, self._entry, self._before, self._on_step = comparison.run, entry, before, on_step

    def __call__(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        entry = self._entry
        entry.done = self._before + done
        left = entry.seconds_left
        times = {"seconds": round(entry.seconds, 1), "seconds_left": round(left or 0.0, 1)}
        self._run.write_progress(step=entry.done, steps=entry.total, **times)
        self._on_step(entry.done, entry.total or 0, {})


def sample_config(comparison: Comparison, name: str) -> SampleConfig:
    """Return the settings by which the model called `name` samples its answers."""
    config, run = comparison.config, comparison.run
    entry = next(one for one in comparison.everyone if one.name == name)
    shared = {key: getattr(config, key) for key in ("seed", "device", "threads", "dtype", "fast_kernels", "disk_wait")}
    return SampleConfig(
        policy=entry.folder,
        prompts=str(run.path / PROMPTS),
        output=str(run.path / FOLDER / name),
        pad_token=config.pad_token,
        sampling=comparison.sampling,
        **shared,
    )


def _prompt(comparison: Comparison, place: int) -> dict[str, Any]:
    content, given = comparison.contents[place], comparison.prompts.prompts[place].content
    row: dict[str, Any] = {"prompt": content}
    if isinstance(given, Conversation) and not isinstance(content, str):
        row |= {"tools": given.tools} if given.tools else {}
        row |= {"chat_template_kwargs": given.template_kwargs} if given.template_kwargs else {}
    return row


def _sampled(comparison: Comparison, name: str, path: Path) -> Answers:
    fix = f"Remove {path.parent}, and this policy is sampled again."
    rows = read_lines(path, len(comparison.contents), fix)
    texts, ended = [row["completions"] for row in rows], [row["ended"] for row in rows]
    if name in comparison.foreign:
        return Answers(texts, encode_answers(texts, ended, comparison.tokenizer), False, ended)
    return Answers(texts, [row["completion_ids"] for row in rows], True, ended)
