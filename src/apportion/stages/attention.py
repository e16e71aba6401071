"""Attention that the loaded models can give, tried on one short text before anything is sampled."""

from __future__ import annotations

from collections.abc import Iterable

from apportion.credit import REWARD_ATTENTION
from apportion.errors import DataError, ModelError, ScoreError
from apportion.evidence import Models, plan
from apportion.generation.given import given_rollouts
from apportion.registry import EvidenceKey
from apportion.types import Rollouts

PROMPT, RESPONSE = "It is short,", " and that is all."


def check_attention(models: Models, needs: Iterable[str]) -> None:
    """Raise ModelError where a method needs attention that its model cannot give."""
    for need in sorted(filter(is_attention, needs)):
        if (error := lacking(models, need)) is not None:
            raise error


def is_attention(need: str) -> bool:
    """Whether evidence is attention of a model, which some models cannot give."""
    name = EvidenceKey.of(need).name
    return name == REWARD_ATTENTION or name.startswith("policy_attention")


def lacking(models: Models, need: str) -> ModelError | None:
    """Return the error that a model raises when it is asked for `need`, or None where it gives it."""
    try:
        for producer, wanted in plan({need}):
            producer.produce(models, short_text(models), wanted)
    except ModelError as error:
        return error
    except (DataError, ScoreError):  # of this text: a run that meets it says so with its row
        return None
    return None


def short_text(models: Models) -> Rollouts:
    """Return one rollout of a few ordinary tokens."""
    encode = models.policy.tokenizer
    prompt, response = (encode(text, add_special_tokens=False)["input_ids"] for text in (PROMPT, RESPONSE))
    return given_rollouts([prompt], [response], models.policy.pad, models.policy.device)
