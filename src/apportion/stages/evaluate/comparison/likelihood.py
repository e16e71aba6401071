"""Log-probabilities of all answers under the policy that gave them and under the start: one model in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from apportion.batching import micro_batches, trim
from apportion.errors import ScoreError
from apportion.generation.given import given_rollouts
from apportion.models.loading import context_of, pick_device, pick_dtype
from apportion.models.policy import Policy, frozen_policy
from apportion.models.tokenizers import load_tokenizer
from apportion.stages.evaluate.comparison.entries import Entry
from apportion.stages.evaluate.comparison.given import Answers, check_positions
from apportion.stages.evaluate.comparison.opening import Comparison
from apportion.stages.evaluate.comparison.store import stored
from apportion.system.progress import counted

ROWS, TOKENS = 32, 4096  # most answers, and positions, of a forward
Logprobs = list[list[list[float]]]  # nats a token, by prompt, answer and token


def own_logprobs(comparison: Comparison, answers: Mapping[str, Answers]) -> dict[str, Logprobs]:
    """Return the log-probabilities of each policy's answers under itself, by name, of those that have them.

    Models whose ids the start can read compute them; given answers bring them from their file.
    """
    found: dict[str, Logprobs] = {}
    for one in comparison.policies:
        given = answers[one.name]
        if not one.is_model and given.logprobs is not None:
            found[one.name] = [list(map(list, group)) for group in given.logprobs]
        elif one.is_model and given.sampled:

            def make(one: Entry = one, given: Answers = given) -> Any:
                policy = load(comparison, one)
                return _rows(policy, comparison.rows[one.name], given, f"log-probabilities of {one.name}")

            rows = stored(comparison.run, f"logprobs/{one.name}.own.jsonl", make, len(comparison.contents))
            found[one.name] = [row["logprobs"] for row in rows]
    return found


def start_logprobs(comparison: Comparison, answers: Mapping[str, Answers]) -> dict[str, Logprobs]:
    """Return the log-probabilities of everyone's answers under the start, by name; none where it is not a model."""
    if not comparison.start.is_model:
        return {}
    loaded: list[Policy] = []
    found: dict[str, Logprobs] = {}
    for one in comparison.everyone:

        def make(one: Entry = one) -> Any:
            field, context = comparison.field(one), context_of(comparison.start.folder, "start")
            check_positions(field, one, answers[one.name], comparison.rows[comparison.start.name], context)
            if not loaded:
                loaded.append(load(comparison, comparison.start))
            rows = comparison.rows[comparison.start.name]
            return _rows(loaded[0], rows, answers[one.name], f"{one.name} under the start")

        rows = stored(comparison.run, f"logprobs/{one.name}.start.jsonl", make, len(comparison.contents))
        found[one.name] = [row["logprobs"] for row in rows]
    return found


def load(comparison: Comparison, entry: Entry) -> Policy:
    """Return the model of an entry, to compute log-probabilities with."""
    config, field = comparison.config, comparison.field(entry)
    device = pick_device(config.device)
    tokenizer = load_tokenizer(field, entry.folder, config.pad_token)
    loading: dict[str, Any] = {"dtype": pick_dtype(config.dtype, device), "device": device}
    loading |= {"pad_token": config.pad_token, "fast_kernels": config.fast_kernels}
    loading |= {"stop": comparison.sampling.stop, "temperature": comparison.sampling.temperature}
    return frozen_policy(field, entry.folder, tokenizer, **loading)


@torch.no_grad()
def _rows(policy: Policy, prompts: Sequence[Sequence[int]], answers: Answers, label: str) -> list[dict[str, Any]]:
    """Return a row a prompt: the log-probabilities of its answers' tokens, in micro-batches of similar length."""
    places = [(i, k) for i, group in enumerate(answers.ids) for k in range(len(group))]
    texts = [answers.ids[i][k] for i, k in places]
    group = [i for i, _ in places]
    rollouts = given_rollouts([prompts[i] for i in group], texts, policy.pad, policy.device, group=group)
    batches = micro_batches(rollouts, torch.arange(len(places), device=policy.device), ROWS, TOKENS)
    values: list[list[float]] = [[] for _ in places]
    for rows in counted(batches, label, len(batches), unit="batch"):
        logprobs = policy.forward(trim(rollouts.select(rows)), values=False).logprobs
        for row, line in zip(rows.tolist(), logprobs.tolist(), strict=True):
            values[row] = _finite(line[: len(texts[row])], places[row], label)
    found = iter(values)
    return [{"logprobs": [next(found) for _ in group]} for group in answers.ids]


def _finite(line: list[float], place: tuple[int, int], label: str) -> list[float]:
    """Return log-probabilities that are all numbers. Raises ScoreError with the place of one that is none."""
    token = next((t for t, value in enumerate(line) if not math.isfinite(value)), None)
    if token is None:
        return line
    where = f"{label}, answer {place[1] + 1} to prompt {place[0] + 1}, token {token + 1}"
    fix = "Give all of them the same pad token with --pad_token, and check the weights and --dtype."
    raise ScoreError(where, line[token], "a finite log-probability", fix)
