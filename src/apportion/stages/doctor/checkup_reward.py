"""What `apportion doctor --stage reward` asks before a reward model is trained; it loads no weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from apportion.config import RewardConfig
from apportion.errors import ConfigError, DataError
from apportion.models.loading import context_of, load_settings, locate, read_tokenizer
from apportion.stages.doctor import Case, Check, Finding, examine
from apportion.stages.doctor.checks import labels, machine, prompts, tokens
from apportion.stages.doctor.checkup import check, left_out, unwritten
from apportion.stages.doctor.findings import ok
from apportion.stages.reward.train import read_data

Said = tuple[str, str, str]


def open_model(case: Case) -> Said:
    """The files of the model to start from are there."""
    case.policy_folder = locate("model", case.config.model)
    case.policy_settings = load_settings("model", case.policy_folder)
    case.context = context_of(case.policy_folder, "model")
    case.tokenizer = read_tokenizer("model", case.policy_folder)
    kind, words = case.policy_settings.model_type, len(case.tokenizer.get_vocab())
    return ok(f"{case.config.model}: {kind}, context {case.context} tokens, vocabulary {words}")


def open_data(case: Case) -> Said:
    """The labelled texts can be read, and both labels are common in training and held-out ones."""
    bad = unwritten(case.config)
    case.training, case.held_out = read_data(case.config, bad)
    return left_out(labels.balance(case), bad)


CHECKS: tuple[Check, ...] = (
    check("processor", machine.processor, error=ConfigError),
    check("model", open_model, opens=True),
    check("pad token", tokens.pad_token, "model"),
    check("labels", open_data, error=DataError, opens=True),
    check("vocabulary", labels.vocabulary, "model", "labels"),
    check("repeated texts", labels.repeated, "labels", error=DataError),
    check("held-out texts", prompts.reward_data, "labels", error=DataError),
    check("excerpts", labels.excerpts, "labels", "model", error=ConfigError),
    check("memory", labels.memory, "model", "processor", error=ConfigError, estimate=True),
)


def checkup_reward(
    config: RewardConfig, *, threads: Any = None, tell: Callable[[str], None] = lambda name: None
) -> list[Finding]:
    """Return what every check finds of `apportion reward` with these settings; `threads`: see `checkup`."""
    return examine(Case(config, threads=threads), CHECKS, tell)
