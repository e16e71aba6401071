"""Rows of supervised training as ids: read, encoded, checked, and split into training and held-out ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from apportion.config import TrainerConfig
from apportion.data import BadRows, usable
from apportion.data.formats import Row
from apportion.data.splits import bucket
from apportion.errors import ConfigError, DataError
from apportion.models.families import check_family
from apportion.models.loading import context_of, embeddings_of, locate
from apportion.models.pretrained import load_settings
from apportion.models.text.chat import check_variables
from apportion.models.text.targets import Counts, Limits, TargetEncoder
from apportion.models.tokenizers import load_tokenizer, pad_id, policy_ends
from apportion.training.monitoring import warn


class Keyed(Protocol):
    """A row as ids, with the text by which it is held out."""

    @property
    def key(self) -> str:
        """The text of its prompt, or all of it."""


K = TypeVar("K", bound=Keyed)
Read = Callable[[str, str | None, TargetEncoder, BadRows | None], list[K]]  # (source, split, encoder, bad) -> rows


class Rows(NamedTuple, Generic[K]):
    """Rows to train on and rows to evaluate on."""

    training: list[K]
    held_out: list[K]


class Start(NamedTuple):
    """The model that training starts from, before its weights are loaded.

    Attributes:
        folder: its folder or hub id. tokenizer: with its pad token. ends: ids at which it stops, EOS first.
    """

    folder: str
    tokenizer: Any
    ends: tuple[int, ...]


def open_start(config: TrainerConfig) -> Start:
    """Return the model to train. Loads its settings and tokenizer only.

    Raises:
        ModelError: it cannot be found, its family cannot be trained, it has no tokenizer or no EOS.
        ConfigError: `max_length` beyond its context, or variables that its chat template does not have.
    """
    folder = locate("model", config.model)
    check_family("model", folder, load_settings("model", folder))
    context = context_of(folder, "model")
    if config.max_length > context:
        expected = f"at most the model's context of {context} tokens"
        raise ConfigError("max_length", config.max_length, expected, f"Pass --max_length {context}, or less.")
    tokenizer = load_tokenizer("model", folder, config.pad_token)
    if config.chat_template_kwargs:
        check_variables("chat_template_kwargs", tokenizer, config.chat_template_kwargs)
    return Start(folder, tokenizer, policy_ends(folder, tokenizer, "eos"))


def encoder_of(config: TrainerConfig, start: Start, setting: str, *, completion_only: bool = True) -> TargetEncoder:
    """Return what turns the rows of `setting` (data or test_data) into ids for the model."""
    embeddings = max(embeddings_of(start.folder, load_settings("model", start.folder)), pad_id(start.tokenizer) + 1)
    limits = Limits(config.max_length, config.overlong, embeddings)
    variables = config.chat_template_kwargs or {}
    return TargetEncoder(setting, start.tokenizer, start.ends, limits, completion_only, variables)


def read_rows(
    config: TrainerConfig, start: Start, read: Read[K], bad: BadRows | None, *, completion_only: bool = True
) -> Rows[K]:
    """Return the rows that `read` makes of `data` and `test_data`, or of `data` split by a hash of the prompts.

    Raises:
        DataError: as `read`; no usable row, or more rows over the limit than others.
        ConfigError: a test split without test_data.
    """
    if config.test_split is not None and config.test_data is None:
        raise ConfigError("test_split", config.test_split, "null without test_data", "Name the data as test_data too.")
    training = _read(config, start, read, bad, "data", config.data, config.split, completion_only)
    if config.test_data is not None:
        held_out = _read(config, start, read, bad, "test_data", config.test_data, config.test_split, completion_only)
    else:
        training, held_out = split_rows(training, config.held_out)
    order = sorted(held_out, key=lambda row: hashlib.sha256(row.key.encode("utf-8", "replace")).digest())
    return Rows(training, order[: config.test_rows])


def split_rows(rows: Sequence[K], share: float) -> tuple[list[K], list[K]]:
    """Return (training, held-out) rows: `share` of the prompts, in hundredths, by a hash of their text.

    Where no row would be left to train on, none is held out.
    """
    marked = [(row, bucket(row.key) < round(100 * share)) for row in rows]
    training = [row for row, held in marked if not held]
    return (training, [row for row, held in marked if held]) if training else (list(rows), [])


def _read(
    config: TrainerConfig,
    start: Start,
    read: Read[K],
    bad: BadRows | None,
    setting: str,
    source: str,
    split: str | None,
    completion_only: bool,
) -> list[K]:
    encoder = encoder_of(config, start, setting, completion_only=completion_only)
    rows = read(source, split, encoder, bad)
    check_counts(encoder.counts, len(rows), setting, source, config)
    return rows


def table_rows(
    source: str, split: str | None, make: Callable[[Row], list[K]], setting: str, bad: BadRows | None
) -> list[K]:
    """Return what `make` makes of the rows of a table, none or several of each."""
    return [one for made in usable(source, make, field=setting, bad=bad, split=split) for one in made]


def check_counts(counts: Counts, usable_rows: int, setting: str, source: str, config: TrainerConfig) -> None:
    """Warn of what happened to the rows of `source`.

    Raises:
        DataError: no row is left, or more were left out for their length than are left.
    """
    left_out = counts.overlong if config.overlong == "drop" else 0
    if left_out > usable_rows:
        got = f"{source}: {left_out} of {left_out + usable_rows} rows are longer than {config.max_length} tokens"
        fix = "Raise max_length, or pass --overlong truncate to cut their ends."
        raise DataError(setting, got, "at least half of them within max_length", fix)
    if not usable_rows:
        got = f"{source}: {counts.equal} pairs, all of two equal texts" if counts.equal else f"{source}: no usable row"
        raise DataError(setting, got, "at least one row to train on", "Give more rows, or others.")
    cut = "left out" if left_out else "cut there, and have no end token"
    lines = {
        f"are longer than max_length {config.max_length} tokens: they are {cut}": counts.overlong,
        "are pairs of two equal texts: they teach nothing and are left out": counts.equal,
        "begin with the BOS which the tokenizer adds: it is written once": counts.bos_removed,
    }
    for text, count in lines.items():
        if count:
            warn(f"{setting}: {source}: {count} rows {text}.")
    if counts.turns_left_out:
        text = "earlier turns of the assistant are not trained on: the chat template writes no end token behind them"
        warn(f"{setting}: {source}: {counts.turns_left_out} {text}, or moves them.")
