"""Inputs of training on rankings: rows rendered, tokenised and held out, and the classifier of one label."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from apportion.config import PreferenceConfig, RewardConfig
from apportion.data import BadRows, Labelled, Layout
from apportion.data.answers.ranking_rows import Ranking
from apportion.data.answers.rankings import kind_of, read_rankings, split_by_prompt
from apportion.data.label_rows import RowReader
from apportion.data.tables import usable
from apportion.errors import ConfigError, DataError
from apportion.models.loading import context_of, locate
from apportion.models.text.labelled import chat_renderer, ranked_texts
from apportion.stages.reward.evaluation import token_ids
from apportion.stages.reward.excerpts import Excerpt, RankedExcerpts
from apportion.stages.reward.ranked import merged
from apportion.training.monitoring import warn


class RankedSplits(NamedTuple):
    """Rankings to train on and to evaluate on, and the excerpts whose mean reward is to be 0.

    Attributes:
        training: units with a pair, equal ones joined. held_out: a unit a ranking.
        centred: excerpts; over: what they are, in words.
    """

    training: list[RankedExcerpts]
    held_out: list[RankedExcerpts]
    centred: list[Excerpt]
    over: str


def reads_rankings(config: RewardConfig) -> bool:
    """Whether `config` trains on rankings: `data` has K completions, or pairs that are to be whole.

    Raises:
        DataError: `data` cannot be read. ConfigError: settings of rankings that would be ignored.
    """
    kind = kind_of(config.data, split=config.split, label=config.label_column or "label")
    paired = kind == "pairs"
    if kind == "rankings" or (paired and config.preferences.whole):
        return True
    usual = PreferenceConfig()
    changed = [
        name for name in PreferenceConfig.model_fields if getattr(config.preferences, name) != getattr(usual, name)
    ]
    if changed:
        value = getattr(config.preferences, changed[0])
        fix = "Pass --preferences.whole true." if paired else "Leave it out, or name a file with completions and ranks."
        expected = "its default, where data are no rankings, nor pairs with preferences.whole"
        raise ConfigError(f"preferences.{changed[0]}", value, expected, fix)
    return False


class Encoder:
    """Renders and tokenises the completions of a ranking; the tokenizer is loaded with the first of them.

    Args:
        load: returns the tokenizer.

    Attributes:
        cut: completions that were longer than `preferences.max_tokens` so far.
    """

    def __init__(self, config: RewardConfig, load: Callable[[], Any], field: str) -> None:
        self.config, self.field, self.cut = config, field, 0
        self.tokenizer = cache(load)
        self._context = cache(lambda: context_of(locate("model", config.model), "model"))
        self._render = chat_renderer(self.tokenizer)

    def __call__(self, ranking: Ranking) -> RankedExcerpts:
        """Return the completions of `ranking` as excerpts.

        Raises:
            DataError: a conversation that cannot be rendered, or a text longer than the context; with its row.
        """
        rows = ranked_texts(ranking, self._render, self.field)
        excerpts, lengths = self.encode(rows, ranking.where)
        ranks = tuple(math.nan if rank is None else rank for rank in ranking.ranks)
        margins = ranking.margins or (0.0,) * len(ranks)
        return RankedExcerpts(excerpts, lengths, [ranks], [margins], ranking.key)

    def encode(self, rows: Sequence[Labelled], where: str) -> tuple[list[Excerpt], list[int]]:
        """Return the texts as excerpts, each with at most `preferences.max_tokens` behind its prompt, and how many."""
        most = self.config.preferences.max_tokens
        tokens = token_ids(rows, self.tokenizer(), self.config, most)
        lengths = [len(ids) - prompt for ids, prompt in zip(tokens.ids, tokens.prompts, strict=True)]
        self.cut += sum(length > most for length in lengths)
        excerpts = [tokens.cut(row, most) for row in range(len(rows))]
        longest, context = max(len(one.ids) for one in excerpts), self._context()
        if longest > context:
            got = f"{where}: {longest} tokens of prompt and answer"
            fix = "Lower preferences.max_tokens, shorten the prompt, or pass --skip_bad_rows."
            raise DataError(self.field, got, f"at most the model's context of {context} tokens", fix)
        return excerpts, [min(length, most) for length in lengths]


def ranked_splits(config: RewardConfig, load: Callable[[], Any], bad: BadRows | None) -> RankedSplits:
    """Return the rankings of `config`, tokenised.

    Without `test_data` a fixed tenth of `data` is held out, by hash of the prompt.

    Raises:
        DataError: as `read_rankings` and `Encoder`; no pair to learn from, or none held out.
    """
    everything = _encoded(config, load, config.data, "data", config.split, bad)
    if config.test_data is None:
        training, held_out = split_by_prompt(everything, lambda one: one.prompt)
    else:
        training = everything
        held_out = _encoded(config, load, config.test_data, "test_data", config.test_split, bad)
    ties = config.preferences.ties
    useful = [one for one in training if one.has_pair(ties)]
    held_out = sorted(
        (one for one in held_out if one.pairs), key=lambda one: hashlib.sha256(one.prompt.encode()).digest()
    )
    if not useful or not held_out:
        which, count = ("train on", len(useful)) if not useful else ("hold out", len(held_out))
        got = f"{len(everything)} rankings, {count} with a pair to {which}"
        raise DataError("data", got, "rankings of several prompts", "Give more, or held-out ones with --test_data.")
    if len(useful) < len(training):
        counts = f"{len(training) - len(useful)} of {len(training)} rankings"
        warn(f"{counts} have no pair (all tied, or not judged): they are left out.")
    centred, over = [excerpt for one in everything for excerpt in one.completions], "the ranked completions"
    if config.preferences.demonstrations is not None:
        centred, over = _demonstrations(config, load, bad), "demonstrations"
    return RankedSplits(merged(useful), held_out[: config.test_texts], centred, over)


def _encoded(
    config: RewardConfig, load: Callable[[], Any], source: str, field: str, split: str | None, bad: BadRows | None
) -> list[RankedExcerpts]:
    encoder = Encoder(config, load, field)
    found = read_rankings(source, field=field, bad=bad, split=split, make=encoder)
    if encoder.cut:
        count, most = sum(len(one.completions) for one in found), config.preferences.max_tokens
        warn(f"{field}: {encoder.cut} of {count} answers are longer than preferences.max_tokens {most}: they are cut.")
    return found


def _demonstrations(config: RewardConfig, load: Callable[[], Any], bad: BadRows | None) -> list[Excerpt]:
    """Return the texts of `preferences.demonstrations` as excerpts."""
    field, source = "preferences.demonstrations", config.preferences.demonstrations or ""
    encoder = Encoder(config, load, field)
    reader = RowReader(Layout(), field, chat_renderer(encoder.tokenizer), labels=False)
    rows = usable(source, lambda row: encoder.encode(reader(row), row.where)[0], field=field, bad=bad)
    return [excerpt for made in rows for excerpt in made]


def counted_excerpts(excerpts: Sequence[Excerpt]) -> tuple[list[Excerpt], list[int]]:
    """Return the different excerpts, and how often each is there."""
    counts = Counter(tuple(one.ids) for one in excerpts)
    return [Excerpt(list(ids), 0) for ids in counts], list(counts.values())
