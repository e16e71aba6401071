"""Policies on the same prompts, compared by rewards and judges: the order of the work.

open -> sample, one model at a time -> log-probabilities, one model at a time -> rewards and judges, once over all
answers -> figures. Each step's results are kept, and an interrupted comparison continues after the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from apportion.config import EvaluateConfig, to_dict
from apportion.models.loading import pick_device
from apportion.stages.evaluate.comparison.figures import Results, all_figures
from apportion.stages.evaluate.comparison.likelihood import own_logprobs, start_logprobs
from apportion.stages.evaluate.comparison.opening import Comparison, open_comparison
from apportion.stages.evaluate.comparison.sampling import all_answers
from apportion.stages.evaluate.comparison.scoring import all_scores
from apportion.stages.evaluate.comparison.store import stored
from apportion.system.progress import activity
from apportion.training.reproducibility import configure_threads, deterministic_kernels
from apportion.training.run_folder import RunFolder
from apportion.training.session import ProgressCallback

FILE, SAMPLES = "evaluation.json", "samples.jsonl"


def compare(
    config: EvaluateConfig,
    *,
    fresh: bool = False,
    on_step: ProgressCallback = lambda step, steps, metrics: None,
    on_progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compare `config.policies` with their start, write evaluation.json and samples.jsonl, and return the figures.

    A finished comparison is not computed again; an interrupted one continues, with the same numbers in the end.

    Args:
        on_step: called after each batch of sampling with (prompts answered by all models, all of them, {}).
        on_progress: called with a line at the beginning of each further step.

    Raises:
        ConfigError, DataError, ModelError: each names the setting and the fix, before a model is loaded where that can
            be. UserCodeError, ScoreError: a reward or judge failed; policy, prompt and answer are named.
        Interrupted: a signal came while answers were sampled.
    """
    run = RunFolder.open(config.output, "evaluate", to_dict(config), fresh=fresh)
    if run.finished:
        return run.read(FILE)
    with run.record_failure(), deterministic_kernels(pick_device(config.device)):
        run.disk_wait = config.disk_wait
        run.update_status(threads=configure_threads(run, config.threads))
        with activity("loading"):
            comparison = open_comparison(config, run)
        answers = all_answers(comparison, on_step)
        on_progress("log-probabilities under each policy and under the start")
        own, start = own_logprobs(comparison, answers), start_logprobs(comparison, answers)
        on_progress(f"scoring by {', '.join(one.key for one in comparison.measures)}")
        results = Results(answers, own, start, all_scores(comparison, answers))
        with activity("win rates and intervals"):
            figures = all_figures(comparison, results)
        stored(run, SAMPLES, lambda: sample_rows(comparison, results))
        run.write_json(FILE, figures)
        run.write_status("finished", prompts=len(comparison.contents))
    return figures


def sample_rows(comparison: Comparison, results: Results) -> Iterator[Mapping[str, Any]]:
    """Yield a row a prompt: prompt, and by policy its answers with their scores, lengths, ends and log-ratios.

    Log-ratios are those of the policy to the start, nats a token; their sum is an estimate of the KL.
    """
    for i, content in enumerate(comparison.contents):
        by_policy = {one.name: _sample(results, one.name, i) for one in comparison.everyone}
        yield {"prompt": content, "policies": by_policy}


def _sample(results: Results, name: str, place: int) -> dict[str, Any]:
    answers = results.answers[name]
    row: dict[str, Any] = {
        "completions": list(answers.texts[place]),
        "tokens": [len(ids) for ids in answers.ids[place]],
    }
    row["ended"] = list(answers.ended[place])
    row["scores"] = {key: scores[name][place] for key, scores in results.scores.items()}
    if name in results.own and name in results.start:
        both = zip(results.own[name][place], results.start[name][place], strict=True)
        row["log_ratios"] = [[round(a - b, 6) for a, b in zip(x, y, strict=True)] for x, y in both]
    return row
