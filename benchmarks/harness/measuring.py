"""Model shapes, seeded models on disk, interleaved timing, intervals, peak allocation and fits."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from apportion.models.loading import load_classifier, locate
from apportion.models.tokenizers import load_tokenizer

SHAPES: dict[str, dict[str, int]] = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "llama-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
    },
    "llama-tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 400,
        "max_position_embeddings": 512,
    },
}


def reward_model(model: str, folder: Path) -> Path:
    """Write a 2-label classifier made from `model`, its head initialised with seed 0, to `folder` and return it."""
    source = locate("--model", model)
    torch.manual_seed(0)
    classifier = load_classifier("--model", source, torch.float32, torch.device("cpu"), new_head=2)
    tokenizer = load_tokenizer("--model", source)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_prompts(path: Path, count: int = 64) -> Path:
    """Write `count` different prompts of some twenty words as JSON lines and return the path."""
    text = "I rented this film because a friend who never likes anything had called it the best of them all."
    rows = [{"prompt": f"{text[i % 7 :]} {text} {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rounds(functions: Sequence[Callable[[], None]], count: int) -> list[list[float]]:
    """Return the seconds of each function, interleaved for `count` rounds; the first one rotates."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(count):
        for place in range(len(functions)):
            which = (turn + place) % len(functions)
            times[which].append(seconds(functions[which]))
    return times


def seconds(function: Callable[[], Any]) -> float:
    """Return the seconds that one call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def difference(name: str, one: list[float], two: list[float], total: float) -> dict[str, float]:
    """Return the median of `two` − `one` in seconds, and as a ratio to `total` with its 95% interval."""
    differences = [b - a for a, b in zip(one, two, strict=True)]
    low, high = median_interval(differences)
    median = statistics.median(differences)
    return {
        f"{name}_s": median,
        f"{name}_ratio": median / total,
        f"{name}_ratio_low": low / total,
        f"{name}_ratio_high": high / total,
    }


def median_interval(values: list[float]) -> tuple[float, float]:
    """Return the 95% interval of the median from order statistics (binomial; all values when there are few)."""
    ordered, n = sorted(values), len(values)
    below, k = 0.0, 0
    while below + math.comb(n, k) / 2**n <= 0.025:
        below += math.comb(n, k) / 2**n
        k += 1
    k = max(0, k - 1)
    return ordered[k], ordered[n - 1 - k]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return {median, min, max}."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


@contextmanager
def peak_bytes() -> Iterator[list[int]]:
    """Yield a list that holds, after the block, the peak of bytes allocated by torch's CPU allocator since its start.

    From the profiler's record of every allocation and release: temporaries inside operations count, memory that MKL
    allocates itself does not.
    """
    peak: list[int] = []
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        yield peak
    assert profile.kineto_results is not None
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    peak.append(highest)


def fitted(lengths: Sequence[int], values: Sequence[float]) -> dict[str, float]:
    """Return the least-squares fit values ≈ a + b·T + c·T², and the quadratic share of the growth at the largest T."""
    t = torch.tensor(lengths, dtype=torch.float64)
    design = torch.stack([torch.ones_like(t), t, t**2], dim=1)
    scale = t.amax()
    powers = torch.stack([torch.ones_like(scale), scale, scale**2])  # columns of equal scale: a well-conditioned fit
    solution = torch.linalg.lstsq(design / powers, torch.tensor(values, dtype=torch.float64)[:, None]).solution[:, 0]
    a, b, c = (solution / powers).tolist()
    grown = abs(b) * float(scale) + abs(c) * float(scale) ** 2
    return {
        "constant": a,
        "per_token": b,
        "per_square": c,
        "square_share": abs(c) * float(scale) ** 2 / grown if grown else 0.0,
    }
