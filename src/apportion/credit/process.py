"""Process rewards: a user's own numbers, one a token or a step, in place of the score or beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion import registry
from apportion.credit._evidence import token_evidence
from apportion.errors import ConfigError, unknown_name
from apportion.types import Credit, Rollouts, State

UNITS = ("token", "step")


def process(*, function: str | None = None, unit: str = "token", keep: bool = False, causal: bool = True) -> Credit:
    """Return p_t, or r_t + p_t with `keep`, where p are rewards that a function of yours gives.

        def rewards(texts, rollouts, prompts):      # lists of B texts; a micro-batch at a time
            return [[0.0, 0.5, -1.0], [1.0], …]     # B rows

    A row holds one number a sampled token (unit "token"), or one a step (unit "step"): an action of the run's
    `segments`, whose last token gets it. In either unit a row may instead hold pairs (token, number), the token
    counted from 0 among the row's sampled tokens: boundaries of your own. Numbers are in units of the score and are
    neither centred nor scaled.

    Args:
        function: "package.module:function" as above; None is for a caller who brings the evidence.
        unit: "token" or "step".
        keep: add to the rewards that come in; False replaces them, the score with them.
        causal: declares that your number for a token reads nothing after it. Set it to false if it does: the policy
            gradient is then biased, and tools say so.

    Needs evidence "process_rewards" (B,T), made by `function`. It does not keep the return: the objective is yours.

    Raises:
        ConfigError: an unknown `unit`, or a `function` that is not such a name.
        DataError: evidence absent, of the wrong shape or not finite.

    Source: Uesato et al. 2022 (arXiv 2211.14275) and Lightman et al. 2023 (arXiv 2305.20050), rewards of steps.

    Assumes: your numbers judge the tokens or steps that they stand on.
    Use it when steps can be checked: tests that pass, a calculator, a step-wise reward model.
    """
    if unit not in UNITS:
        raise unknown_name("process.unit", str(unit), UNITS)
    for field, value in (("keep", keep), ("causal", causal)):
        if not isinstance(value, bool):
            raise ConfigError(f"process.{field}", value, "true or false", "Write it without quotes.")
    if function is not None:
        registry.find("process.function", function, {})  # imports it: a mistyped name is told before models load
    settings = {} if function is None else {"function": function, "unit": unit}
    name = registry.ask("process_rewards", **settings)

    def assign(rollouts: Rollouts, rewards: Tensor, state: State) -> tuple[Tensor, State]:
        given = token_evidence(rollouts, name)
        paid = rewards.float() + given if keep else given
        return torch.where(rollouts.mask, paid, 0.0).to(rewards.dtype), state

    def stats(rollouts: Rollouts, before: Tensor, after: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return {"credit/process": (token_evidence(rollouts, name).sum(), rollouts.mask.any(dim=1).sum().float())}

    return Credit(dict, assign, frozenset({name}), keeps_return=False, causal=causal, stats=stats)
