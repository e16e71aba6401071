"""Inputs of the checks: settings, files, tokenizers, prompts and models of one run, filled in as they are opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from apportion.types import Rollouts


@dataclass
class Case:
    """One run to check. What was not opened yet is None; a check that uses it comes after the one that opens it.

    Attributes:
        config: its settings. method: its choices (`types.Method`). threads: what `cpu.configure_threads` returned.
        policy_folder, reward_folder: where the two models are. policy_settings, reward_settings: their `config.json`.
        tokenizer, reward_tokenizer: their tokenizers, as stored.
        stops: ids at which the policy's generation settings end a text.
        texts: its prompts, texts or conversations; rows: their ids; context: the policy's longest sequence, tokens.
        evaluation: prompts of the evaluation after training.
        training, held_out: (text, label) rows that the reward model was trained and evaluated on.
        labelled: (text, label) rows to test the order of scores on; the held-out rows by default.
        policy, reward: the models (`models.policy.Policy`, `models.reward.RewardModel`).
        rollouts: a few responses of the policy, unscored.
        notes: results that other checks use: the method's "needs", the prompts' "conversations", "hidden" arguments of
            tool calls that the chat template leaves out, and why the reward model's "reward_data" could not be read.
    """

    config: Any
    method: Any = None
    threads: Any = None
    policy_folder: str = ""
    reward_folder: str = ""
    policy_settings: Any = None
    reward_settings: Any = None
    tokenizer: Any = None
    reward_tokenizer: Any = None
    stops: frozenset[int] = frozenset()
    texts: Sequence[Any] = ()
    rows: Sequence[Sequence[int]] = ()
    context: int = 0
    evaluation: Sequence[Any] | None = None
    training: Sequence[Any] | None = None
    held_out: Sequence[Any] | None = None
    labelled: Sequence[Any] | None = None
    policy: Any = None
    reward: Any = None
    rollouts: Rollouts | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def conversations(self) -> list[Any]:
        """The prompts that are conversations; empty where prompts are cut to their first tokens."""
        if self.config.sampling.prompt_tokens is not None:
            return []
        return [text for text in self.texts if not isinstance(text, str)]

    @property
    def longest(self) -> int:
        """Largest number of tokens of a prompt and its response."""
        return max(map(len, self.rows), default=0) + int(self.config.sampling.max_new_tokens)
