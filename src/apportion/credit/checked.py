"""A credit of the user's own, checked wherever it is called: what it raises or returns wrongly is an error by name."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.errors import ApportionError, ConfigError, ScoreError, message
from apportion.types import Credit, Rollouts, State

CHECK = "Check it with `apportion doctor --credit NAME`."


def checked(name: str, credit: Credit) -> Credit:
    """Return `credit` with its `init`, `assign` and `update` checked if it is a user's, "package.module:function".

    Another one is itself. They then raise:
        ConfigError: the user's code raised an error, or returned something else than rewards (B,T) and a state.
        ScoreError: a reward on the mask is not finite; it names rollout and token.
    """
    if ":" not in name:
        return credit

    def init() -> State:
        return _state(name, _called(name, credit.init))

    def assign(rollouts: Rollouts, rewards: Tensor, state: State) -> tuple[Tensor, State]:
        made = _called(name, credit.assign, rollouts, rewards, state)
        if not isinstance(made, tuple) or len(made) != 2:
            came = f"{name}, which returned a {type(made).__name__}"
            raise ConfigError(message("credit", came, "a pair: rewards (B,T) and a state", CHECK))
        _check_rewards(name, made[0], rollouts.mask)
        return made[0], _state(name, made[1])

    def update(state: State, sums: Any) -> State:
        assert credit.update is not None
        return _state(name, _called(name, credit.update, state, sums))

    return credit._replace(init=init, assign=assign, update=None if credit.update is None else update)


def _called(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except ApportionError:
        raise
    except Exception as error:  # whatever a user's function raises
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        came = f"{name}, which raised {said} ({Path(last.filename).name}, line {last.lineno})"
        raise ConfigError(message("credit", came, "rewards (B,T) and a state", CHECK)) from error


def _state(name: str, state: Any) -> State:
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        came = f"{name}, whose state is a {type(state).__name__}"
        raise ConfigError(message("credit", came, "a dict of tensors as its state", CHECK))
    return state


def _check_rewards(name: str, rewards: Any, mask: Tensor) -> None:
    shape = tuple(mask.shape)
    if not isinstance(rewards, Tensor) or tuple(rewards.shape) != shape or not rewards.is_floating_point():
        tensor = isinstance(rewards, Tensor)
        came = f"{rewards.dtype} {tuple(rewards.shape)}" if tensor else f"a {type(rewards).__name__}"
        raise ConfigError(message("credit", f"{name}, which returned {came}", f"float rewards {shape}", CHECK))
    bad = mask & ~torch.isfinite(rewards)
    if bad.any():
        row, token = (int(i) for i in bad.nonzero()[0])
        field = f"credit of rollout {row}, token {token}, from {name}"
        number = float(rewards[row, token])
        raise ScoreError(message(field, number, "a finite number", f"A failure never becomes a reward. {CHECK}"))
