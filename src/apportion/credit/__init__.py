"""Credit methods: pure functions from rewards (B,T) to rewards (B,T) that decide where the reward lands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from apportion import registry
from apportion.credit._attention_spec import REWARD_ATTENTION, AttentionSpec, attention_spec, requested_attention
from apportion.credit._redistribute import redistributor
from apportion.credit.attention import attention
from apportion.credit.attribution import attribution
from apportion.credit.implicit import implicit
from apportion.credit.kl_penalty import kl_penalty
from apportion.credit.length_penalty import length_penalty
from apportion.credit.policy_attention import policy_attention
from apportion.credit.prefix_difference import prefix_difference
from apportion.credit.process import process
from apportion.credit.shapley import shapley
from apportion.credit.sparse import sparse
from apportion.credit.uniform import uniform
from apportion.errors import ConfigError, DataError, ScoreError
from apportion.masking import check_finite, place_on_last
from apportion.registry import EvidenceKey
from apportion.types import Credit, Rollouts, State

FACTORIES = (
    sparse,
    uniform,
    attention,
    policy_attention,
    prefix_difference,
    attribution,
    shapley,
    implicit,
    process,
    kl_penalty,
    length_penalty,
)
METHODS: Mapping[str, Callable[..., Credit]] = {f.__name__: f for f in FACTORIES}
__all__ = [
    "METHODS",
    "REWARD_ATTENTION",
    "AttentionSpec",
    "apply",
    "attention",
    "attention_spec",
    "attribution",
    "bootstrap_conflict",
    "chain",
    "find",
    "implicit",
    "kl_penalty",
    "length_penalty",
    "make",
    "names",
    "policy_attention",
    "prefix_difference",
    "process",
    "redistributor",
    "requested_attention",
    "shapley",
    "sparse",
    "uniform",
]


def names() -> tuple[str, ...]:
    """Return the built-in credit methods' names."""
    return tuple(METHODS)


def find(name: str) -> Callable[..., Credit]:
    """Return the credit factory of that name, or "package.module:function". Raises ConfigError with suggestions."""
    return registry.find("credit", name, METHODS)


def chain(*credits: Credit, allow_redistributing_penalties: bool = False) -> Credit:
    """Return the credits composed from left to right, each on the rewards that the one before returned.

    A redistributor after a credit that changes the return (a KL penalty) would spread that penalty over the row, which
    no paper does; it is an error unless `allow_redistributing_penalties`. State keys are prefixed by position.

    Raises:
        ConfigError: that order, or no credits.
    """
    if not credits:
        raise ConfigError("credit", "an empty chain", "at least one credit", "Use `sparse` for plain RLHF.")
    changed = False
    for position, one in enumerate(credits):
        if (one.share is not None or one.redistributes) and changed and not allow_redistributing_penalties:
            got = f"a redistributor at position {position}, after a credit that changes the return"
            fix = "Put kl_penalty last, or pass allow_redistributing_penalties=True."
            raise ConfigError("credit", got, "redistributors before penalties", fix)
        changed = changed or not one.keeps_return

    def part(state: State, i: int) -> State:
        return {k.removeprefix(f"{i}."): v for k, v in state.items() if k.startswith(f"{i}.")}

    def join(parts: list[State]) -> State:
        return {f"{i}.{k}": v for i, p in enumerate(parts) for k, v in p.items()}

    def init() -> State:
        return join([c.init() for c in credits])

    def assign(rollouts: Rollouts, rewards: Tensor, state: State) -> tuple[Tensor, State]:
        parts = []
        for i, c in enumerate(credits):
            rewards, after = c.assign(rollouts, rewards, part(state, i))
            parts.append(after)
        return rewards, join(parts)

    def stats(rollouts: Rollouts, before: Tensor, after: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return {k: v for c in credits if c.stats for k, v in c.stats(rollouts, before, after).items()}

    def update(state: State, sums: dict[str, tuple[Tensor, Tensor]]) -> State:
        parts = [part(state, i) for i in range(len(credits))]
        return join([c.update(p, sums) if c.update else p for c, p in zip(credits, parts, strict=True)])

    return Credit(
        init,
        assign,
        needs=frozenset[str]().union(*(c.needs for c in credits)),
        keeps_return=all(c.keeps_return for c in credits),
        causal=all(c.causal for c in credits),
        share=next((c.share for c in reversed(credits) if c.share is not None), None),
        stats=stats,
        update=update,
        redistributes=any(c.redistributes for c in credits),
    )


def apply(credit: Credit, rollouts: Rollouts, state: State | None = None) -> tuple[Tensor, State]:
    """Return (rewards (B,T) float32, state): `credit` of the scores (B,), placed on each row's last token.

    Raises:
        ConfigError: rows were cut off, evidence "bootstrap_values" stands for what would have followed, and `credit`
            pays their tokens by that too (every credit that spreads or moves the score; see `bootstrap_conflict`).
        DataError: the rollouts have no scores.
        ScoreError: a score is not finite; it names the rollout and is never replaced by a number.
    """
    if rollouts.scores is None:
        raise DataError("Rollouts.scores", None, "scores (B,)", "Score the rollouts first.")
    check_finite("score", rollouts.scores, "Check the reward model.", error=ScoreError)
    _check_bootstrap(credit, rollouts)
    rewards = place_on_last(rollouts.scores.float(), rollouts.mask)
    return credit.assign(rollouts, rewards, credit.init() if state is None else state)


def bootstrap_conflict(credit: Credit) -> str | None:
    """Return why a critic's value after a cut cannot complete what `credit` pays a cut response; None where it can.

    The value V(s_T) after a cut is the expected sum of the rewards from there on. So a cut response is worth what it
    would have been worth in expectation, Σ_{t<T} r_t + V(s_T) = E[Σ_t r_t | s_T], if each of its tokens is paid what it
    gets in every continuation. A credit that spreads the score pays tokens before the cut by what comes after it: the
    expectation of that, E[Σ_{t<T} r_t | s_T], is in no critic of the rewards to go, nor in any other evidence.
    """
    if credit.share is not None or credit.redistributes or not credit.causal:
        return "pays tokens before a cut by what comes after it"
    keys = [EvidenceKey.of(need) for need in credit.needs]
    if any(key.name == "process_rewards" and key.settings.get("unit") == "step" for key in keys):
        return "pays for a step that a cut may have left unfinished"
    return None


def _check_bootstrap(credit: Credit, rollouts: Rollouts) -> None:
    reason = bootstrap_conflict(credit)
    count = 0 if reason is None else int(rollouts.bootstrapped.sum())
    if count:
        got = f"one that {reason}, with evidence bootstrap_values and {count} responses that were cut off"
        fix = "Use sparse, or treat a cut response as terminal, mask or penalty (ppo.truncated)."
        raise ConfigError("credit", got, "a credit that pays a token the same however the response continues", fix)


def make(name: str, kwargs: dict[str, Any]) -> Credit:
    """Return the credit of that name with these keyword arguments.

    Raises:
        ConfigError: an unknown name or key, a value out of range, or a user-supplied function that returns no Credit.
    """
    method = registry.call("credit", name, find(name), kwargs)
    if not isinstance(method, Credit):
        fix = "Return apportion.Credit(init, assign, needs, keeps_return, causal)."
        raise ConfigError("credit", f"{name}, which returned a {type(method).__name__}", "a Credit", fix)
    named = isinstance(method.needs, frozenset) and all(isinstance(need, str) for need in method.needs)
    if not named or not callable(method.init) or not callable(method.assign):
        got = f"{name}, which returned Credit({method.init!r:.40}, {method.assign!r:.40}, needs={method.needs!r:.60})"
        fix = "Return apportion.Credit(init, assign, needs, keeps_return, causal)."
        raise ConfigError("credit", got, "functions init and assign, and a frozenset of names", fix)
    return method
