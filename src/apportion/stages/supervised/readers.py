"""Demonstrations and preference pairs as the ids that sft and dpo train on."""

from __future__ import annotations

from apportion.config import DPOConfig, SFTConfig
from apportion.data import BadRows
from apportion.data.answers import Demonstration, DemonstrationReader, PairReader, builtin_demonstrations
from apportion.errors import ConfigError
from apportion.models.text.targets import PairTarget, Target, TargetEncoder
from apportion.stages.supervised.rows import Rows, Start, read_rows, table_rows
from apportion.training.monitoring import warn


def demonstrations(config: SFTConfig, start: Start, bad: BadRows | None) -> Rows[Target]:
    """Return the demonstrations to train on, and held-out ones. Raises as `read_rows`."""

    def read(source: str, split: str | None, encoder: TargetEncoder, bad: BadRows | None) -> list[Target]:
        def encoded(given: Demonstration) -> list[Target]:
            made = encoder.encode(given)
            return [] if made is None else [made]

        builtin = builtin_demonstrations(source, encoder.setting, split)
        if builtin is not None:
            return [one for given in builtin for one in encoded(given)]
        reader = DemonstrationReader(encoder.setting, config.text_column, config.prompt_column)
        return table_rows(source, split, lambda row: encoded(reader(row)), encoder.setting, bad)

    return read_rows(config, start, read, bad, completion_only=config.completion_only)


def preference_pairs(config: DPOConfig, start: Start, bad: BadRows | None) -> Rows[PairTarget]:
    """Return the pairs to train on, and held-out ones. Raises as `read_rows`."""

    def read(source: str, split: str | None, encoder: TargetEncoder, bad: BadRows | None) -> list[PairTarget]:
        reader = PairReader(encoder.setting, config.prompt_column, config.ranking_pairs)
        rows = table_rows(
            source,
            split,
            lambda row: [made for pair in reader(row) if (made := encoder.encode_pair(pair)) is not None],
            encoder.setting,
            bad,
        )
        encoder.counts.equal += reader.rankings.equal
        reader.rankings.equal = 0  # counted once, with those that are equal as ids
        for line in reader.rankings.left_out():
            warn(f"{encoder.setting}: {source}: {line}.")
        if reader.unpaired:
            warn(f"{encoder.setting}: {source}: {reader.unpaired} rankings give no pair (ties, or not judged).")
        return rows

    return read_rows(config, start, read, bad)


def check_loss(config: DPOConfig) -> None:
    """Raise ConfigError for label smoothing where the loss has none."""
    if config.loss == "ipo" and config.label_smoothing:
        fix = "Leave it out: IPO already keeps the margin finite."
        raise ConfigError("label_smoothing", config.label_smoothing, "0 with loss ipo", fix)
