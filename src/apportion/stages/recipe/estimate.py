"""Seconds and memory of a recipe's stages on this machine: counted operations over measured rates.

Rates and efficiencies are those of the demo's plan (docs/demo.md). Tokens are taken as four characters each, and what a
stage will write is partly guessed: good to about a factor of two, and on the safe side where it cannot be known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from apportion.algorithms import ALGORITHMS
from apportion.config import reward_path
from apportion.config.chain.resolve import Stage
from apportion.models.loading import pick_device, pick_dtype
from apportion.stages.doctor.checks import footprint
from apportion.stages.recipe.shapes import Size
from apportion.stages.recipe.tables import Table
from apportion.system.rates import FORWARD, FULL_STEP, STEP, Work

LOADING = 20.0  # seconds of loading libraries and models, and of saving
PLAIN = 3.0  # seconds of a stage without a model
CHAT = 20  # tokens of a chat template around a prompt, about
UNKNOWN = Table(0, 100.0, 200.0, 0)  # lengths where nothing is known


class Estimate(NamedTuple):
    """Seconds and peak bytes of a stage; None where they are not known, and `why`."""

    seconds: float | None
    memory: float | None
    why: str = ""


def estimated(stage: Stage, size: Size | None, tables: Mapping[str, Table | None], work: Work) -> Estimate:
    """Return the estimate of a stage.

    Args:
        size: of its model, None where the model is not on this machine. tables: {setting: what it reads}.
    """
    if stage.kind == "label":
        return Estimate(None, footprint.LIBRARIES / 4, "waits for people")
    if stage.kind == "split":
        return Estimate(PLAIN, footprint.LIBRARIES / 2)
    if size is None:
        return Estimate(None, None, "the model is not on this machine")
    seconds = SECONDS[stage.kind](stage.config, size, tables, work)
    memory = memory_of(stage, size, tables)
    why = "" if seconds is not None else "its data are not on this machine"
    return Estimate(None if seconds is None else seconds + LOADING, memory, why)


def sft_seconds(config: Any, size: Size, tables: Mapping[str, Table | None], work: Work) -> float | None:
    """Return the seconds of the optimizer steps, and of the held-out loss before and after."""
    table = tables.get("data")
    rows = row_count(config, None if table is None else table.rows)
    if rows is None:
        return None
    tokens = min((table or UNKNOWN).prompt + (table or UNKNOWN).answer + CHAT, config.max_length)
    held = 0 if table is None else min(config.test_rows, config.held_out * table.rows)
    trained = work.products("train", step(config) * (size.blocks + size.head) * tokens * rows)
    return trained + work.products("read", 2 * FORWARD * (size.blocks + size.head) * tokens * held)


def row_count(config: Any, rows: float | None) -> float | None:
    """Return the rows that a stage on TRL's trainers learns from, repeated ones counted again."""
    if config.steps is not None:
        return float(config.steps * config.batch_size)
    return None if rows is None else rows * (1 - config.held_out * (config.test_data is None)) * config.epochs


def dpo_seconds(config: Any, size: Size, tables: Mapping[str, Table | None], work: Work) -> float | None:
    """Return the seconds of the optimizer steps, whose pairs are two sequences, of policy and reference."""
    table = tables.get("data")
    pairs = None if table is None else float(table.rows)
    if table is not None and config.ranking_pairs == "all":
        each = table.answers / max(1, table.rows)
        pairs = table.rows * each * (each - 1) / 2
    rows = row_count(config, pairs)
    if rows is None:
        return None
    tokens = min((table or UNKNOWN).prompt + (table or UNKNOWN).answer + CHAT, config.max_length)
    return work.products("train", 2 * (step(config) + FORWARD) * (size.blocks + size.head) * tokens * rows)


def reward_seconds(config: Any, size: Size, tables: Mapping[str, Table | None], work: Work) -> float | None:
    """Return the seconds of the probe, the optimizer steps and the evaluation: ranked answers, or excerpts."""
    table = tables.get("data")
    if table is not None and table.answers > table.rows:
        tokens = table.prompt + CHAT + min(table.answer, config.preferences.max_tokens)
        texts, held = 0.9 * table.answers * config.preferences.epochs, 1.1 * table.answers  # the zero mean reads all
    elif table is None and config.data != "imdb":
        return None
    else:
        tokens, texts = sum(config.excerpt_tokens) / 2, float(config.excerpts)
        held = min(config.test_texts, 0.1 * table.rows if table else config.test_texts)
    read = work.products("read", FORWARD * size.blocks * tokens * (min(config.probe_excerpts, texts) + held))
    return read + work.products("train", step(config) * size.blocks * tokens * texts)


def rl_seconds(config: Any, size: Size, tables: Mapping[str, Table | None], work: Work) -> float | None:
    """Return the seconds of the batches: generation, log-probabilities of policy and reference, scores, the update."""
    prompt, new, rows = prompt_tokens(config, tables), config.sampling.max_new_tokens, config.sampling.batch_size
    tokens = rows * (size.blocks * (prompt + new) + size.head * new)
    batch = work.generation(size.blocks, size.head, rows, prompt, new)
    batch += work.products("score", 2 * FORWARD * tokens)
    if reward_path(config) is not None:  # taken to be of the policy's size
        batch += work.products(
            "score",
            FORWARD * rows * size.blocks * (prompt + new),
            "float32" if config.reward_dtype == "float32" else work.dtype,
        )
    return float(config.steps * (batch + work.products("update", step(config) * epochs_of(config) * tokens)))


def epochs_of(config: Any) -> int:
    """Return the passes over a batch: as set, else 4 with a critic and 1 without."""
    named = ALGORITHMS.get(config.algorithm)
    estimator = config.advantages if config.advantages is not None else getattr(named, "advantages", None)
    return int(config.ppo.epochs or (4 if "gae" in str(estimator) else 1))


def sample_seconds(config: Any, size: Size, tables: Mapping[str, Table | None], work: Work) -> float | None:
    """Return the seconds of the answers, each as long as it may be."""
    table = tables.get("prompts")
    prompts = config.count or (None if table is None else table.rows)
    if prompts is None:
        return None
    prompt, answers = prompt_tokens(config, tables), config.sampling.samples_per_prompt
    operations = (size.blocks + size.head) * answers * config.sampling.max_new_tokens + size.blocks * prompt
    return prompts * work.products("generate", FORWARD * operations)


def evaluate_seconds(config: Any, size: Size, tables: Mapping[str, Table | None], work: Work) -> float | None:
    """Return the seconds of every policy's answers, their scores, and their log-probabilities under the start."""
    prompt, new = prompt_tokens(config, tables), config.sampling.max_new_tokens
    rows = config.count * (getattr(config.sampling, "samples_per_prompt", None) or 1)
    policies = len(config.policies) + 1
    judges = sum(len(value) if isinstance(value, list) else 1 for value in (config.rewards, config.judges) if value)
    tokens = rows * (size.blocks * (prompt + new) + size.head * new)
    one = work.generation(size.blocks, size.head, rows, prompt, new) + work.products("score", 2 * FORWARD * tokens)
    one += judges * work.products("score", FORWARD * rows * size.blocks * (prompt + new), "float32")
    return policies * one


def prompt_tokens(config: Any, tables: Mapping[str, Table | None]) -> float:
    """Return the mean tokens of a prompt, about."""
    if config.sampling.prompt_tokens is not None:
        return float(sum(config.sampling.prompt_tokens) / 2)
    table = tables.get("prompts")
    return float(min(table.prompt + CHAT if table is not None else UNKNOWN.prompt, config.sampling.max_prompt_tokens))


def step(config: Any) -> int:
    """Return the operations a weight and token of an optimizer step."""
    return STEP if config.lora.rank else FULL_STEP


SECONDS = {
    "sft": sft_seconds,
    "reward": reward_seconds,
    "dpo": dpo_seconds,
    "rl": rl_seconds,
    "sample": sample_seconds,
    "evaluate": evaluate_seconds,
}


def memory_of(stage: Stage, size: Size, tables: Mapping[str, Table | None]) -> float:
    """Return the peak bytes of a stage, about: weights, optimizer, and the largest phase or micro-batch."""
    config, shape = stage.config, size.shape
    dtype = pick_dtype(config.dtype, pick_device(config.device))
    if stage.kind == "rl":
        longest = int(prompt_tokens(config, tables)) + config.sampling.max_new_tokens
        reward = shape if reward_path(config) is not None else shape._replace(weights=0, hidden=0, inner=0)
        return footprint.total(footprint.memory(shape, reward, config, longest, dtype))
    width = dtype.itemsize
    if stage.kind in ("sample", "evaluate"):
        models = 1 if stage.kind == "sample" else 3
        rows = config.sampling.batch_size if stage.kind == "sample" else config.count
        longest = prompt_tokens(config, tables) + config.sampling.max_new_tokens
        cache = rows * longest * shape.layers * 2 * shape.shared * shape.head * width
        return float(footprint.LIBRARIES + models * shape.weights * max(width, 4 if models > 1 else width) + cache)
    full = config.lora.rank == 0
    table = tables.get("data") or UNKNOWN
    longest = min(table.prompt + table.answer + CHAT, getattr(config, "max_length", 1024))
    tokens = config.micro_batch * longest * (2 if stage.kind == "dpo" else 1)
    saved = tokens * shape.layers * (8 * shape.hidden + 3 * shape.inner) * width
    logits = 0.0 if stage.kind == "reward" else 3.0 * tokens * shape.vocabulary * 4
    weights = shape.weights * (16 if full else width)
    return float(footprint.LIBRARIES + weights + saved + logits)
