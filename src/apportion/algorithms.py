"""The named algorithms: few-line combinations of a credit, segments and an estimator, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
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


PENALTY = {"kl_penalty": {"coef": 0.05, "target": 10.0, "horizon": 400}}

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
    refuse(parts)
    method = credit.build(parts["credit"])
    specs = {k: [{name: kwargs} for name, kwargs in v] for k, v in parts.items()}
    return Method(method, segments.build(parts["segments"]), advantages.build(parts["advantages"]), specs)


def merge(named: Spec, given: Spec) -> Spec:
    """Return the credit chain to use: `given` alone if it is a list, else `given` followed by the named penalty."""
    if given is None:
        return named
    if isinstance(given, (list, tuple)):
        return given
    penalties = [spec for spec in registry.parse("credit", named) if spec[0] == "kl_penalty"]
    return [given, *({name: kwargs} for name, kwargs in penalties if name not in dict(registry.parse("credit", given)))]


def refuse(parts: Mapping[str, list[tuple[str, dict[str, Any]]]]) -> None:
    """Raise ConfigError for a combination that means nothing; the table of them is `REFUSED`."""
    names = {name for pairs in parts.values() for name, _ in pairs}
    chain = [name for name, _ in parts["credit"]]
    if len(set(chain)) < len(chain):
        raise ConfigError(message("credit", chain, "each method once", "Drop the repeated one."))
    for left, right, why in REFUSED:
        if left in names and right in names:
            raise ConfigError(message("credit × segments × advantages", f"{left} with {right}", "one of them", why))


# (one method, another, why they mean nothing together)
REFUSED: tuple[tuple[str, str, str], ...] = (
    ("attention", "uniform", "Two redistributors in a chain: the second spreads what the first spread. Choose one."),
    ("attention", "policy_attention", "Two redistributors in a chain. Choose one."),
    ("policy_attention", "uniform", "Two redistributors in a chain. Choose one."),
)

REDISTRIBUTORS = frozenset({"attention", "uniform", "policy_attention"})


def discount_warning(specs: Mapping[str, Any]) -> str | None:
    """Return a warning when γ < 1 meets a redistributing credit: the return is then no longer what was scored."""
    gamma = next((kwargs.get("gamma", 1.0) for pair in specs["advantages"] for kwargs in pair.values()), 1.0)
    spreading = [name for pair in specs["credit"] for name in pair if name in REDISTRIBUTORS]
    if gamma >= 1.0 or not spreading:
        return None
    expected = "1 with a redistributing credit"
    mend = f"With γ < 1, {spreading[0]} changes the discounted return, so the optimum moves. Use gamma: 1."
    return message("advantages.gae.gamma", gamma, expected, mend)
