"""Reward functions in TRL's signature, which runs of the tests import by their path: sound ones and some that fail."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from typing import Any

import torch

SEEN: list[dict[str, Any]] = []  # what each call of `seen` in this process was given


def count_a(completions: list[str], **columns: Any) -> list[float]:
    """Return the number of a's of each completion."""
    assert "prompt" not in columns
    return [float(text.count("a")) for text in completions]


def seen(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Keep everything that it is given, and return the number of ids."""
    SEEN.append({"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns})
    return [float(len(ids)) for ids in completion_ids]


async def first(completions: list[str], number: list[int] | None = None) -> list[float]:
    """Wait until `second` has run as well: it hangs unless both are gathered."""
    global ready
    ready = asyncio.Event()
    await asyncio.wait_for(ready.wait(), 5)
    return [1.0] * len(completions)


async def second(completions: list[str]) -> list[float]:
    """Let `first` continue."""
    await asyncio.sleep(0.01)
    ready.set()
    return [2.0] * len(completions)


def every_other(completions: list[str]) -> list[float | None]:
    """Return 1 for even places, None for odd ones."""
    return [None if place % 2 else 1.0 for place in range(len(completions))]


def the_rest(completions: list[str]) -> list[float | None]:
    """Return 3 for odd places, None for even ones."""
    return [3.0 if place % 2 else None for place in range(len(completions))]


def per_token(completion_ids: list[list[int]]) -> list[list[float]]:
    """Return 1 for even ids, 0 for odd ones."""
    return [[float(i % 2 == 0) for i in ids] for ids in completion_ids]


def nothing(completions: list[str]) -> list[None]:
    """Return None for every completion."""
    return [None] * len(completions)


def too_few(completions: list[str]) -> list[float]:
    """Return one reward less than completions."""
    return [1.0] * (len(completions) - 1)


def words(completions: list[str]) -> list[Any]:
    """Return a word for the third completion."""
    return ["good" if place == 2 else 1.0 for place in range(len(completions))]


def not_a_number(completions: list[str]) -> list[float]:
    """Return NaN for the second completion."""
    return [float("nan") if place == 1 else 1.0 for place in range(len(completions))]


def short_list(completion_ids: list[list[int]]) -> list[list[float]]:
    """Return a number too few for the last completion."""
    return [[0.0] * (len(ids) - (place == len(completion_ids) - 1)) for place, ids in enumerate(completion_ids)]


def mapping(completions: list[str]) -> dict[str, float]:
    """Return a mapping instead of a list."""
    return {"reward": 1.0}


def raises(completion_ids: list[list[int]], number: list[int]) -> list[float]:
    """Fail for the rows of prompt 2, 5, 8, …"""
    if any(one % 3 == 2 for one in number):
        raise LookupError("no such answer")
    return [1.0] * len(completion_ids)


async def raises_later(completion_ids: list[list[int]], number: list[int]) -> list[float]:
    """Fail for the rows of prompt 2, 5, 8, … after an await."""
    await asyncio.sleep(0)
    return raises(completion_ids, number)


def down(completions: list[str]) -> list[float]:
    """Fail for every completion."""
    raise ConnectionError("the service is down")


def hangs(completions: list[str]) -> list[float]:
    """Never return."""
    time.sleep(600)
    return [0.0] * len(completions)


async def hangs_later(completions: list[str]) -> list[float]:
    """Never return, in an await."""
    await asyncio.sleep(600)
    return [0.0] * len(completions)


def takes_answer(completions: list[str], answer: list[str]) -> list[float]:
    """Return 1 where the completion holds the answer."""
    return [float(one in text) for one, text in zip(answer, completions, strict=True)]


def positional(completions: list[str], /) -> list[float]:
    """Take completions by position only."""
    return [1.0] * len(completions)


def changes_everything(
    prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], tags: list[list[str]]
) -> list[float]:
    """Return the number of tags, and empty every argument, in place and in depth."""
    answers = [float(len(one)) for one in tags]
    for given in (*completion_ids, *tags, prompts, completions, completion_ids, tags):
        given.clear()
    return answers


def tags_and_ids(completion_ids: list[list[int]], tags: list[list[str]]) -> list[float]:
    """Return the number of tags and of ids."""
    return [float(len(tag) + len(ids)) for tag, ids in zip(tags, completion_ids, strict=True)]


def changes_torch(completions: list[str]) -> list[float]:
    """Switch gradients off and set another default type, as a script that scores with a model of its own may."""
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.use_deterministic_algorithms(True)
    os.chdir("/")
    return [float(place) for place in range(len(completions))]


def pooled(completions: list[str]) -> list[float]:
    """Return the lengths, counted by workers that are forked, and ended by SIGTERM."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return [float(length) for length in pool.map(len, completions)]


async def cancelled(completions: list[str]) -> list[float]:
    """Await a task that was cancelled."""
    task = asyncio.ensure_future(asyncio.sleep(600))
    task.cancel()
    await task
    return [0.0] * len(completions)


def too_large(completions: list[str]) -> list[float]:
    """Return a number for the second completion that float32 cannot hold."""
    return [1e39 if place == 1 else 1.0 for place in range(len(completions))]
