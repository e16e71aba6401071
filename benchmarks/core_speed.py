"""Milliseconds of every pure-tensor method on a batch of 64 responses of 512 tokens, on one core.

    python -m benchmarks.core_speed [--json]

Also prints the cost of methods that call models: tokens a second of the parser, model calls of `shapley` and `vine`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from apportion import Rollouts, advantages, credit, losses, segments
from apportion.errors import ConfigError

ROWS, LENGTH, REPEATS, LIMIT_MS = 64, 512, 15, 50.0
A_ROW = ("prompt_score", "shapley_empty", "shapley_error", "shapley_calls", "shapley_joined", "bootstrap_values")


def main() -> int:
    """Measure and print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {"rows": ROWS, "tokens": LENGTH, "limit_ms": LIMIT_MS, "ms": measure()}
    if options.json:
        print(json.dumps(result))
        return 0
    for name, value in result["ms"].items():
        print(f"{name:<32} {value:7.2f} ms  {value / LIMIT_MS:6.1%} of {LIMIT_MS:.0f} ms")
    for line in model_costs():
        print(line)
    return 0


def measure() -> dict[str, float]:
    """Return {kind.name: median ms} of every method that needs only tensors."""
    result: dict[str, float] = {}
    tokens = segments.tokens()
    for name, factory in credit.METHODS.items():
        method = factory()
        batch = rollouts(method.needs)
        result[f"credit.{name}"] = timed(lambda m=method, b=batch: credit.apply(m, b))
    for name, factory in segments.METHODS.items():
        segment = factory()
        batch = rollouts(segment.needs)
        result[f"segments.{name}"] = timed(lambda s=segment, b=batch: s(b))
    for name, factory in advantages.METHODS.items():
        estimate = factory()
        batch = rollouts(estimate.needs)
        ids, rewards = tokens(batch), credit.apply(credit.sparse(), batch)[0]
        result[f"advantages.{name}"] = timed(lambda e=estimate, r=rewards, i=ids, b=batch: e(r, i, b))
    for name, factory in losses.METHODS.items():
        loss = factory(**({"length": LENGTH} if name == "dr_grpo" else {}))
        batch = rollouts(loss.needs)
        ids, adv = tokens(batch), torch.randn(ROWS, LENGTH)
        moved = (batch.logprobs + 0.01 * torch.randn(ROWS, LENGTH)).requires_grad_()
        result[f"losses.{name}"] = timed(
            lambda f=loss, b=batch, a=adv, i=ids, x=moved: f.terms(x, b, a, b.mask, i)[0].backward()
        )
    return result


def timed(call: Callable[[], Any]) -> float:
    """Return the median ms of `call` after one warm-up call."""
    call()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began))
    return median(times)


def rollouts(needs: frozenset[str]) -> Rollouts:
    """Return 64 responses of up to 512 tokens, 4 a prompt, with random evidence."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (ROWS,), generator=generator)
    mask = torch.arange(LENGTH) < lengths[:, None]
    evidence = {}
    for name in needs:
        shape = (ROWS,) if name.partition("@")[0] in A_ROW else (ROWS, LENGTH)
        noise = torch.rand(shape, generator=generator)
        boundary = "boundaries" in name
        evidence[name] = noise < 0.1 if boundary else -noise if "logprobs" in name else noise
    return Rollouts(
        prompt_ids=torch.zeros(ROWS, 4, dtype=torch.int64),
        prompt_mask=torch.ones(ROWS, 4, dtype=torch.bool),
        response_ids=torch.randint(5, 1000, (ROWS, LENGTH), generator=generator),
        mask=mask,
        logprobs=-torch.rand(ROWS, LENGTH, generator=generator),
        scores=torch.randn(ROWS, generator=generator),
        group=torch.arange(ROWS) // 4,
        evidence=evidence,
    )


def model_costs() -> list[str]:
    """Return lines on the methods that call models or a parser."""
    lines = []
    batch = rollouts(frozenset({"sentence_boundaries"}))
    actions = int((segments.sentences()(batch).amax(dim=1) + 1).sum())
    vine = advantages.vine()
    lines.append(f"vine: {vine.samples * actions} fresh responses for {actions} actions of {ROWS} responses")  # type: ignore[attr-defined]
    lines.append(f"shapley: at most 64 reward-model texts a response, {64 * ROWS} for {ROWS} (setting `budget`)")
    try:
        lines.append(f"parsed: {parser_speed():,.0f} tokens/s")
    except ConfigError as error:
        lines.append(f"parsed: {error}")
    return lines


def parser_speed() -> float:
    """Return the words a second of the parser of `segments.parsed`."""
    from apportion.evidence.text.phrases import check_parser, parse

    check_parser()
    text = "I rented this film because everyone called it wonderful, and it was a great story well told. " * 4
    parse(text)
    began, words = time.perf_counter(), 0
    while time.perf_counter() - began < 2.0:
        parse(text)
        words += len(text.split())
    return words / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
