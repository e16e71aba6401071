"""Checks of an `apportion reward` run before training; they load no weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from apportion.config import RewardConfig
from apportion.data import BadRows, Layout, labelled_splits
from apportion.data.answers.rankings import kind_of, read_rankings, split_by_prompt
from apportion.data.label_rows import Render
from apportion.errors import ConfigError, DataError
from apportion.models.loading import context_of, locate
from apportion.models.pretrained import load_settings
from apportion.models.text.labelled import chat_renderer, ranked_texts
from apportion.models.tokenizers import read_tokenizer
from apportion.stages.doctor import Case, Check, Finding, run_checks
from apportion.stages.doctor.checks import labels, machine, prompts, tokens
from apportion.stages.doctor.findings import Result, ok
from apportion.stages.doctor.rl import bad_row_counter, check, with_bad_rows


def open_model(case: Case) -> Result:
    """The files of the base model exist."""
    case.policy_folder = locate("model", case.config.model)
    case.policy_settings = load_settings("model", case.policy_folder)
    case.context = context_of(case.policy_folder, "model")
    case.tokenizer = read_tokenizer("model", case.policy_folder)
    kind, words = case.policy_settings.model_type, len(case.tokenizer.get_vocab())
    return ok(f"{case.config.model}: {kind}, context {case.context} tokens, vocabulary {words}")


def open_data(case: Case) -> Result:
    """The labelled texts or rankings can be read, and both labels are common in training and held-out texts."""
    bad = bad_row_counter(case.config)
    config = case.config
    render = None if case.tokenizer is None else chat_renderer(lambda: case.tokenizer)
    kind = kind_of(config.data, split=config.split, label=config.label_column or "label")
    if kind == "rankings" or (kind == "pairs" and config.preferences.whole):
        return with_bad_rows(open_rankings(case, bad, render), bad)
    case.training, case.held_out = labelled_splits(
        config.data, config.test_data, config.test_texts, bad, layout=Layout.of(config), render=render
    )
    return with_bad_rows(labels.balance(case), bad)


def open_rankings(case: Case, bad: BadRows | None, render: Render | None) -> Result:
    """Read the rankings; their completions are the training and held-out texts of the other checks."""
    config = case.config
    training = read_rankings(config.data, bad=bad, split=config.split)
    if config.test_data is None:
        training, held_out = split_by_prompt(training, lambda one: one.key)
    else:
        held_out = read_rankings(config.test_data, field="test_data", bad=bad, split=config.test_split)
    if render is not None:
        texts = [[text for one in part for text in ranked_texts(one, render, "data")] for part in (training, held_out)]
        case.training, case.held_out = texts
    case.notes["rankings"] = True
    return labels.rankings([one.pairs for one in training], [one.pairs for one in held_out])


CHECKS: tuple[Check, ...] = (
    check("processor", machine.processor, error=ConfigError),
    check("model", open_model, opens=True),
    check("pad token", tokens.pad_token, "model"),
    check("labels", open_data, error=DataError, opens=True),
    check("text tokens", labels.text_ids, "model", "labels", error=DataError),
    check("beginning of text", labels.beginning, "model", "labels", error=DataError),
    check("vocabulary", labels.vocabulary, "model", "labels"),
    check("repeated texts", labels.repeated, "labels", error=DataError),
    check("held-out texts", prompts.reward_data, "labels", error=DataError),
    check("excerpts", labels.excerpts, "labels", "model", error=ConfigError),
    check("memory", labels.memory, "model", "processor", error=ConfigError, estimate=True),
)


def check_reward(
    config: RewardConfig, *, threads: Any = None, on_check: Callable[[str], None] = lambda name: None
) -> list[Finding]:
    """Return the findings of all checks for `apportion reward` with these settings; see `rl.check_rl`."""
    return run_checks(Case(config, threads=threads), CHECKS, on_check)
