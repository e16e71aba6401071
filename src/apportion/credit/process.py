"""Process rewards: user-supplied numbers, one a token or a step, in place of the score or added to it."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion import registry
from apportion.errors import check_flag, unknown_name
from apportion.registry import EvidenceKey
from apportion.types import Credit, Rollouts, State

DENSE = "dense_rewards"  # evidence (B,T): rewards a token that a run's reward functions gave, weighted and summed
UNITS = ("token", "step")


def process(*, function: str | None = None, unit: str = "token", keep: bool = False, causal: bool = True) -> Credit:
    """Return p_t, or r_t + p_t with `keep`, where p are the rewards that `function` returns.

        def rewards(texts, rollouts, prompts):      # lists of B texts; a micro-batch at a time
            return [[0.0, 0.5, -1.0], [1.0], …]     # B rows, or B numbers

    A row holds one number a sampled token (unit "token"), or one a step (unit "step"): an action of the run's
    `segments`, whose last token gets it. In either unit a row may instead hold pairs (token, number), the token
    counted from 0 among the row's sampled tokens; and B numbers without rows are on the responses' last tokens. An
    array (B,T) holds a number at each position, those off the mask ignored. Lists, arrays and tensors count alike.
    Numbers are in units of the score and are neither centred nor scaled.

    Further parameters of `function`, such as `answer`, are given the columns of that name in the prompts' rows, lists
    of B values; `**columns` is given all.

    Args:
        function: "package.module:function" as above; None is for a caller who supplies the evidence.
        unit: "token" or "step".
        keep: add to the input rewards; False replaces them, the score included.
        causal: declares that the number for a token depends on nothing after it. Set it to false otherwise: the
            policy gradient is then biased, and reports say so.

    Needs evidence "process_rewards" (B,T), made by `function`. It does not keep the return: it replaces the objective.

    Raises:
        ConfigError: an unknown `unit`, or a `function` that is not such a name.
        DataError: evidence absent, of the wrong shape or not finite.

    Source: Uesato et al. 2022 (arXiv 2211.14275) and Lightman et al. 2023 (arXiv 2305.20050), rewards of steps.

    Assumes: each number judges the token or step that it is given to.
    Use it when steps can be checked: tests that pass, a calculator, a step-wise reward model.
    """
    if unit not in UNITS:
        raise unknown_name("process.unit", str(unit), UNITS)
    for field, value in (("keep", keep), ("causal", causal)):
        check_flag(f"process.{field}", value)
    if function is not None:
        registry.find(
            "process.function", function, {}
        )  # imports it, so that a mistyped name fails before models are loaded
    settings = {} if function is None else {"function": function, "unit": unit}
    name = EvidenceKey("process_rewards", **settings)

    def assign(rollouts: Rollouts, rewards: Tensor, state: State) -> tuple[Tensor, State]:
        process_rewards = rollouts.token_evidence(name)
        paid = rewards.float() + process_rewards if keep else process_rewards
        return torch.where(rollouts.mask, paid, 0.0).to(rewards.dtype), state

    def stats(rollouts: Rollouts, before: Tensor, after: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return {"credit/process": (rollouts.token_evidence(name).sum(), rollouts.mask.any(dim=1).sum().float())}

    return Credit(dict, assign, frozenset({name}), keeps_return=False, causal=causal, stats=stats)


def with_dense(credit: Credit) -> Credit:
    """Return `credit` with evidence "dense_rewards" (B,T) added to its rewards: what functions gave tokens themselves.

    `credit` places the score only, and the tokens keep what they were given, as those of `process` do with `keep`. So
    the sum of a row's rewards is not its score.
    """

    def assign(rollouts: Rollouts, rewards: Tensor, state: State) -> tuple[Tensor, State]:
        placed, state = credit.assign(rollouts, rewards, state)
        return placed + rollouts.token_evidence(DENSE).to(placed.dtype), state

    return credit._replace(assign=assign, needs=credit.needs | {DENSE}, keeps_return=False)
