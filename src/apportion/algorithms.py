"""The named algorithms: combinations of a credit, segments, an estimator and a policy loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from apportion import advantages, compatibility, credit, losses, registry, segments
from apportion.errors import unknown_name
from apportion.types import Method
from apportion.user_code import guard_credit

Spec = Any  # a name, {name: {key: value}}, or a list of these
FIELDS = ("credit", "segments", "advantages", "loss")


class Algorithm(NamedTuple):
    """One named combination, with the paper it comes from and what it does in one line."""

    credit: Spec
    segments: Spec
    advantages: Spec
    paper: str
    formula: str
    loss: Spec = "ppo"


KL = {"kl_penalty": {"coef": 0.12, "target": 8.0, "horizon": 400}}
ACTIONS = {"ngrams": {"n": 5}}
WHOLE = "whole_response"
ABC, MA, RLOO = "Chan et al. 2024, 2402.00782", "Chai et al. 2024, 2410.02743", "Ahmadian et al. 2024, 2402.14740"
GRPO = "Shao et al. 2024, 2402.03300"


def weighted(name: str) -> Spec:
    """Return the group estimator `name` with its advantage spread by the credit's shares, β = 0.8."""
    return {name: {"credit_mix": 0.8}}


ALGORITHMS: Mapping[str, Algorithm] = {
    # one score on the last token, and where else it may land; token-level PPO
    "ppo": Algorithm(["sparse", KL], "tokens", "gae", "Ouyang et al. 2022, 2203.02155", "r_t = R·1[t=last] − κ·kl_t"),
    "uniform": Algorithm(["uniform", KL], "tokens", "gae", ABC, "r_t = R/T − κ·kl_t"),
    "abc": Algorithm(["attention", KL], "tokens", "gae", ABC, "r_t = β·α_t·R + (1−β)·R·1[t=last] − κ·kl_t"),
    "abc-d": Algorithm(["policy_attention", KL], "tokens", "gae", ABC, "ABC with α from the policy, all steps"),
    "abc-d2": Algorithm(
        [{"policy_attention": {"view": "last"}}, KL], "tokens", "gae", ABC, "ABC with α from the policy, last step"
    ),
    "red": Algorithm(
        ["prefix_difference", KL], "tokens", "gae", "Li et al. 2024, 2411.08302", "r_t = R(y≤t) − R(y<t) − κ·kl_t"
    ),
    "rto": Algorithm(
        ["sparse", "implicit", {"kl_penalty": {"coef": 0.01}}],
        "tokens",
        "gae",
        "Zhong et al. 2024, 2404.18922",
        "r_t = clip(β₁·log π_DPO/π_ref) + R·1[t=last] − κ·kl_t",
    ),
    "scar": Algorithm(
        ["shapley", KL], "tokens", "gae", "Cao et al. 2025, 2505.20417", "r_t = Shapley value of its span"
    ),
    # macro actions
    "ma-ppo": Algorithm(["sparse", KL], ACTIONS, "gae", MA, "PPO over 5-grams, V at their first token"),
    "ma-ppo-paper": Algorithm(
        ["sparse", KL], ACTIONS, {"gae": {"pooling": "mean"}}, MA, "PPO over 5-grams, V the mean of their tokens"
    ),
    "ma-ppo-code": Algorithm(
        ["sparse", KL],
        {"ngrams": {"n": 5, "reproduce": "ma-rlhf-code"}},
        {"gae": {"pooling": "mean", "reproduce": "ma-rlhf-code"}},
        MA,
        "as the released code: mean reward, last token its own action",
    ),
    "abc-ma": Algorithm(["attention", KL], ACTIONS, "gae", f"{ABC}; {MA}", "ABC's rewards, summed over 5-grams"),
    "bandit": Algorithm(["sparse", KL], WHOLE, "gae", MA, "one action a response: A = R − κ·kl − V"),
    # several samples a prompt, no critic
    "grpo": Algorithm(
        ["sparse"], WHOLE, "group_relative", GRPO, "A = (R − mean)/std of the prompt", {"grpo": {"kl_coef": 0.04}}
    ),
    "abc-grpo": Algorithm(
        ["attention"],
        WHOLE,
        weighted("group_relative"),
        f"{ABC}; {GRPO}",
        "A_t = A·((1−β) + β·n·α_t), at most 3·A",
        {"grpo": {"kl_coef": 0.04}},
    ),
    "dr-grpo": Algorithm(
        ["sparse"],
        WHOLE,
        {"group_relative": {"std": False}},
        "Liu et al. 2025, 2503.20783",
        "A = R − mean; the loss divided by a constant",
        "dr_grpo",
    ),
    "dapo": Algorithm(
        ["sparse"], WHOLE, "group_relative", "Yu et al. 2025, 2503.14476", "GRPO, clip 0.2/0.28, token mean", "dapo"
    ),
    "gspo": Algorithm(
        ["sparse"], WHOLE, "group_relative", "Zheng et al. 2025, 2507.18071", "one ratio a response", "gspo"
    ),
    "cispo": Algorithm(
        ["sparse"], WHOLE, "group_relative", "MiniMax 2025, 2506.13585", "clipped weight times log π", "cispo"
    ),
    "rloo": Algorithm(
        ["sparse", KL], WHOLE, "leave_one_out", RLOO, "A = R − mean of the prompt's other samples", "reinforce"
    ),
    "abc-rloo": Algorithm(
        ["attention", KL], WHOLE, weighted("leave_one_out"), f"{ABC}; {RLOO}", "RLOO, A spread by α", "reinforce"
    ),
    "reinforce": Algorithm(["sparse", KL], "tokens", "monte_carlo", "Williams 1992", "A_t = Σ_{i≥t} r_i", "reinforce"),
    "reinforce++": Algorithm(
        ["sparse", KL], "tokens", "reinforce_pp", "Hu et al. 2025, 2501.03262", "Σ_{i≥t} r_i, normalised over the batch"
    ),
    "reinforce++-baseline": Algorithm(
        ["sparse", KL],
        "tokens",
        {"reinforce_pp": {"baseline": "group"}},
        "Hu et al. 2025, 2501.03262",
        "minus the prompt's mean first",
    ),
    "vineppo": Algorithm(
        ["sparse", KL],
        "sentences",
        "vine",
        "Kazemnejad et al. 2024, 2410.01679",
        "A_k = r_k + V(s_{k+1}) − V(s_k), V by fresh rollouts",
    ),
}


def build(
    algorithm: str,
    *,
    credit_spec: Spec = None,
    segments_spec: Spec = None,
    advantages_spec: Spec = None,
    loss_spec: Spec = None,
) -> Method:
    """Return the method called `algorithm`, with any of its choices replaced.

    A single credit in place of the algorithm's is followed by the algorithm's KL penalty; a list is the whole chain.

    Raises:
        ConfigError: an unknown name or setting, or a combination without meaning (`compatibility`).
    """
    if algorithm not in ALGORITHMS:
        raise unknown_name("algorithm", algorithm, ALGORITHMS)
    named = ALGORITHMS[algorithm]
    given = (merge(named.credit, credit_spec), segments_spec, advantages_spec, loss_spec)
    parts = {
        field: registry.parse(field, getattr(named, field) if spec is None else spec)
        for field, spec in zip(FIELDS, given, strict=True)
    }
    compatibility.check_distinct([name for name, _ in parts["credit"]])
    credits = {name: guard_credit(name, credit.make(name, kwargs)) for name, kwargs in parts["credit"]}
    compatibility.check_redistributors(credits)
    method = Method(
        credit.chain(*credits.values()),
        segments.build(parts["segments"]),
        advantages.build(parts["advantages"]),
        losses.build(parts["loss"]),
        {field: [{name: kwargs} for name, kwargs in pairs] for field, pairs in parts.items()},
    )
    names = {field: pairs[0][0] for field, pairs in parts.items()}
    compatibility.check_methods(compatibility.Combination(credits, method.segment, method.estimate, method.loss, names))
    return method


def merge(named: Spec, given: Spec) -> Spec:
    """Return the credit chain to use: only `given` if it is a list, else `given` followed by the named penalty."""
    if given is None:
        return named
    if isinstance(given, (list, tuple)):
        return given
    penalties = [spec for spec in registry.parse("credit", named) if spec[0] == "kl_penalty"]
    return [given, *({name: kwargs} for name, kwargs in penalties if name not in dict(registry.parse("credit", given)))]
