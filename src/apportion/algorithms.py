"""The named algorithms: few-line combinations of a credit, segments and an estimator, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from apportion import advantages, credit, registry, segments
from apportion.errors import ConfigError, message, unknown_name
from apportion.types import Credit, Estimator, Segmenter

Spec = Any  # a name, {name: {key: value}}, or a list of these


class Algorithm(NamedTuple):
    """One named combination, with the paper it comes from and its reward in one line."""

    credit: Spec
    segments: Spec
    advantages: Spec
    paper: str
    formula: str


PENALTY = {"kl_penalty": {"coef": 0.12, "target": 8.0, "horizon": 400}}

ALGORITHMS: Mapping[str, Algorithm] = {
    "ppo": Algorithm(["sparse", PENALTY], "tokens", "gae", "Ouyang et al. 2022", "r_t = R·1[t=last] − κ·kl_t"),
    "uniform": Algorithm(["uniform", PENALTY], "tokens", "gae", "Chan et al. 2024", "r_t = R/T − κ·kl_t"),
    "abc": Algorithm(
        ["attention", PENALTY], "tokens", "gae", "Chan et al. 2024", "r_t = β·α_t·R + (1−β)·R·1[t=last] − κ·kl_t"
    ),
    "abc-d": Algorithm(
        ["policy_attention", PENALTY], "tokens", "gae", "Chan et al. 2024", "ABC with α from the policy, all steps"
    ),
    "abc-d2": Algorithm(
        [{"policy_attention": {"view": "last"}}, PENALTY],
        "tokens",
        "gae",
        "Chan et al. 2024",
        "ABC with α from the policy, last step",
    ),
}


class Method(NamedTuple):
    """The three choices, built, beside their resolved specs (for the run folder)."""

    credit: Credit
    segment: Segmenter
    estimate: Estimator
    specs: dict[str, Any]

    @property
    def needs(self) -> frozenset[str]:
        """Return the names of all evidence that the three methods need."""
        return self.credit.needs | self.segment.needs | self.estimate.needs


def build(
    algorithm: str, *, credit_spec: Spec = None, segments_spec: Spec = None, advantages_spec: Spec = None
) -> Method:
    """Return the method of that name, with any of its three choices replaced.

    A single credit in place of the algorithm's is followed by the algorithm's KL penalty; a list is the whole chain.

    Raises:
        ConfigError: an unknown name or setting, or a combination that means nothing.
    """
    if algorithm not in ALGORITHMS:
        raise ConfigError(unknown_name("algorithm", algorithm, ALGORITHMS))
    named = ALGORITHMS[algorithm]
    chosen = merge(named.credit, credit_spec)
    parts = {
        "credit": registry.parse("credit", chosen),
        "segments": registry.parse("segments", segments_spec or named.segments),
        "advantages": registry.parse("advantages", advantages_spec or named.advantages),
    }
    names = [name for name, _ in parts["credit"]]
    credits = {name: credit.make(name, kwargs) for name, kwargs in parts["credit"]}
    refuse(credits, names)
    specs = {k: [{name: kwargs} for name, kwargs in v] for k, v in parts.items()}
    chain = credit.chain(*credits.values())
    return Method(chain, segments.build(parts["segments"]), advantages.build(parts["advantages"]), specs)


def merge(named: Spec, given: Spec) -> Spec:
    """Return the credit chain to use: `given` alone if it is a list, else `given` followed by the named penalty."""
    if given is None:
        return named
    if isinstance(given, (list, tuple)):
        return given
    penalties = [spec for spec in registry.parse("credit", named) if spec[0] == "kl_penalty"]
    return [given, *({name: kwargs} for name, kwargs in penalties if name not in dict(registry.parse("credit", given)))]


def refuse(credits: Mapping[str, Credit], names: Sequence[str]) -> None:
    """Raise ConfigError for a credit chain that means nothing: a method twice, or two that redistribute."""
    if len(set(names)) < len(names):
        raise ConfigError(message("credit", list(names), "each method once", "Drop the repeated one."))
    spreading = redistributors(credits)
    if len(spreading) > 1:
        came = " with ".join(spreading)
        mend = "The second would spread what the first has spread. Choose one."
        raise ConfigError(message("credit", came, "at most one redistributor", mend))


def redistributors(credits: Mapping[str, Credit]) -> list[str]:
    """Return the names of the credits that redistribute, a user's too: those that declare a share, or say so."""
    return [name for name, one in credits.items() if one.share is not None or one.redistributes]


def discount_warning(method: Method) -> str | None:
    """Return a warning when γ < 1 meets a redistributing credit: the return is then no longer what was scored."""
    gamma = getattr(method.estimate, "gamma", 1.0)
    if gamma >= 1.0 or not (method.credit.share is not None or method.credit.redistributes):
        return None
    expected = "1 with a redistributing credit"
    mend = "With γ < 1 a redistribution changes the discounted return, so the optimum moves. Use gamma: 1."
    return message("advantages.gae.gamma", gamma, expected, mend)
