"""The refusal table: combinations of methods that mean nothing, each refused by name with what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from apportion.errors import ConfigError
from apportion.types import Credit, Estimator, PolicyLoss, Segmenter


class Combination(NamedTuple):
    """The built choices, and the name of each by field ("credit", "segments", "advantages", "loss")."""

    credits: Mapping[str, Credit]
    segment: Segmenter
    estimate: Estimator
    loss: PolicyLoss
    names: Mapping[str, str]

    @property
    def dense(self) -> list[str]:
        """The credits that move a reward to other tokens: where it lands is all that they say, up to a constant."""
        return [
            name
            for name, one in self.credits.items()
            if name != "sparse" and (one.keeps_return or one.share is not None or one.redistributes)
        ]

    @property
    def beyond_the_score(self) -> list[str]:
        """The credits that a mean score of fresh rollouts does not foresee; a KL penalty is paid as it comes."""
        return [name for name in self.credits if name not in ("sparse", "kl_penalty")]

    @property
    def spreading(self) -> list[str]:
        """The credits that declare how they share a score out."""
        return [name for name, one in self.credits.items() if one.share is not None]

    @property
    def weighs(self) -> bool:
        """Whether the estimator weighs its advantage by the credit's shares."""
        return "credit_share" in self.estimate.needs

    @property
    def scalar(self) -> bool:
        """Whether the estimator reads the sum of each row's rewards only."""
        return bool(getattr(self.estimate, "scalar", False))


class Refusal(NamedTuple):
    """One line of the table: when it applies, the field and the value it names, what was expected, the fix."""

    applies: Callable[[Combination], bool]
    field: str
    got: Callable[[Combination], str]
    expected: str
    fix: str


def pair(first: str, second: str) -> Callable[[Combination], str]:
    """Return the names of two choices, joined."""
    return lambda c: f"{c.names[first]} with {c.names[second]}"


TABLE: tuple[Refusal, ...] = (
    Refusal(
        lambda c: c.scalar and bool(c.dense) and not c.weighs,
        "credit",
        lambda c: f"{c.dense[0]} with {c.names['advantages']}",
        "sparse: this estimator sums each row's rewards, so where they land is lost",
        "Set advantages.credit_mix above 0 to weigh its advantage by the credit's shares, or use sparse.",
    ),
    Refusal(
        lambda c: c.weighs and not c.spreading,
        "advantages",
        lambda c: f"credit_mix > 0 of {c.names['advantages']} with {' + '.join(c.credits)}",
        "a credit that shares a score out (uniform, attention, policy_attention)",
        "Choose such a credit, or set advantages.credit_mix to 0.",
    ),
    Refusal(
        lambda c: (
            c.loss.ratio == "sequence" and (c.weighs or not (c.scalar or c.names["segments"] == "whole_response"))
        ),
        "loss",
        lambda c: f"{c.names['loss']} with the token-wise advantages of {c.names['advantages']}",
        "one advantage a response: its ratio covers the whole response",
        "Use gspo's token form (loss: {gspo: {token: true}}), segments: whole_response, or credit_mix 0.",
    ),
    Refusal(
        lambda c: c.loss.ratio == "action" and c.weighs,
        "loss",
        lambda c: f"ratio action with credit_mix > 0 of {c.names['advantages']}",
        "one advantage an action: its ratio covers the whole action",
        "Use ratio: token, or set advantages.credit_mix to 0.",
    ),
    Refusal(
        lambda c: c.names["advantages"] == "vine" and bool(c.beyond_the_score),
        "credit",
        lambda c: f"{c.beyond_the_score[0]} with vine",
        "sparse, with kl_penalty at most: vine's values are mean scores of fresh rollouts, and nothing else is in them",
        "Use sparse with vine, or gae with this credit.",
    ),
    Refusal(
        lambda c: "reference_logprobs" in c.loss.needs and "kl_penalty" in c.credits,
        "loss",
        lambda c: f"kl_coef > 0 of {c.names['loss']} with kl_penalty in the credit",
        "the distance to the reference paid once",
        "Set loss.kl_coef to 0, or drop kl_penalty from the credit (give credit as a list).",
    ),
)


def refuse(combination: Combination) -> None:
    """Raise ConfigError for the first line of the table that applies."""
    for line in TABLE:
        if line.applies(combination):
            raise ConfigError(line.field, line.got(combination), line.expected, line.fix)


def refuse_repeated(names: Sequence[str]) -> None:
    """Raise ConfigError for a credit chain that holds a method twice."""
    if len(set(names)) < len(names):
        raise ConfigError("credit", list(names), "each method once", "Drop the repeated one.")


def refuse_credits(credits: Mapping[str, Credit]) -> None:
    """Raise ConfigError for a credit chain with two that redistribute."""
    spreading = redistributors(credits)
    if len(spreading) > 1:
        got = " with ".join(spreading)
        fix = "The second would spread what the first has spread. Choose one."
        raise ConfigError("credit", got, "at most one redistributor", fix)


def redistributors(credits: Mapping[str, Credit]) -> list[str]:
    """Return the names of the credits that redistribute, a user's too: those that declare a share, or say so."""
    return [name for name, one in credits.items() if one.share is not None or one.redistributes]
