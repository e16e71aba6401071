"""Methods of the user's in a run: every call has its time, whoever makes it, and an estimator's answer is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from apportion.algorithms import Method
from apportion.errors import ConfigError, message
from apportion.evidence.users import Users
from apportion.types import Advantages, Credit


class Timed:
    """A segmenter or estimator of the user's: calling it, or its `stats`, is asking it; all else is its own."""

    def __init__(self, name: str, method: Any, users: Users) -> None:
        self.name, self.method, self.users = name, method, users

    def __call__(self, *given: Any) -> Any:
        return self.users.ask(self.name, self.method, *given)

    def __getattr__(self, key: str) -> Any:
        found = getattr(self.method, key)
        return partial(self.users.ask, self.name, found) if key == "stats" else found


def in_time(method: Method, users: Users) -> Method:
    """Return `method` with the time that `users` keeps for every call of a credit, segmenter or estimator of the
    user's."""
    name = {kind: own([name for spec in method.specs[kind] for name in spec]) for kind in ("segments", "advantages")}
    parts: dict[str, Any] = {"segments": method.segment, "advantages": method.estimate}
    parts = {k: part if name[k] is None else Timed(str(name[k]), part, users) for k, part in parts.items()}
    chain = credit_in_time([name for spec in method.specs["credit"] for name in spec], method.credit, users)
    return method._replace(credit=chain, segment=parts["segments"], estimate=parts["advantages"])


def credit_in_time(names: Iterable[str], credit: Credit, users: Users) -> Credit:
    """Return `credit`, a chain of those called `names`, with each of its functions timed if one is the user's."""
    name = own(names)
    if name is None:
        return credit

    def timed(function: Callable[..., Any] | None) -> Any:
        return None if function is None else partial(users.ask, name, function)

    functions = ("init", "assign", "share", "stats", "update")
    return credit._replace(**{key: timed(getattr(credit, key)) for key in functions})


def own(names: Iterable[str]) -> str | None:
    """Return the first "package.module:function" of `names`, None without one."""
    return next((name for name in names if ":" in name), None)


def check_estimated(specs: Mapping[str, Any], made: Any, mask: Tensor) -> Advantages:
    """Return what the estimator of `specs` gave for rollouts with `mask` (B,T), as Advantages.

    Raises:
        ConfigError: it is not a pair advantages, returns of float tensors (B,T) on the rollouts' device.
    """
    name = next(iter(specs["advantages"][0]))
    for field in Advantages._fields:
        given: Any = getattr(made, field, None)
        shape = tuple(mask.shape)
        fits = isinstance(given, Tensor) and given.is_floating_point() and given.device == mask.device
        if not fits or tuple(given.shape) != shape:
            came = f"{name}, which returned {_kind(given if hasattr(made, field) else made)}"
            expected = f"Advantages(advantages, returns), each a float tensor {shape} on {mask.device}"
            raise ConfigError(message(f"advantages ({field})", came, expected, "Mend the estimator."))
    return Advantages(made.advantages, made.returns)


def _kind(value: Any) -> str:
    tensor = isinstance(value, Tensor)
    return f"{value.dtype} {tuple(value.shape)} on {value.device}" if tensor else f"a {type(value).__name__}"


def means(specs: Mapping[str, Any], kind: str, sums: Any) -> dict[str, float]:
    """Return {name: sum / count} of what the `stats` of the methods of that kind gave: {name: (sum (), count ())}.

    Raises:
        ConfigError: they gave something else.
    """
    pairs = list(sums.items()) if isinstance(sums, Mapping) else [("", sums)]
    for name, pair in pairs:
        fits = isinstance(name, str) and isinstance(pair, tuple) and len(pair) == 2
        if not fits or not all(isinstance(part, Tensor) and part.numel() == 1 for part in pair):
            names = ", ".join(name for spec in specs[kind] for name in spec)
            expected = "{name: (sum, count)}, two tensors of one number each"
            came = f"{names}, which returned {pair!r:.80}"
            raise ConfigError(message(f"{kind} (stats {name})", came, expected, "Mend its `stats`."))
    return {name: float(total / torch.clamp_min(count, 1)) for name, (total, count) in pairs}
