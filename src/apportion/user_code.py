"""User-supplied methods and functions: time limits, validation of what they return, errors that name them."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from apportion.errors import ApportionError, ConfigError, DataError, ScoreError, UserCodeError
from apportion.segments import check as check_segments
from apportion.system.time_limit import Deadline, TimedOut
from apportion.types import Advantages, Credit, Estimator, Method, Rollouts, Segmenter, State

USER_DEFINED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # package.module:function
LONGEST = 300  # characters of a user's error in ours; the traceback has the rest
RAISED = "A failure never becomes a reward: fix the function, or have it return a number for such a text"
LATE = "Give the function a time limit of its own for what it waits for, or raise monitors.timeout"


class Users:
    """Calls functions of the user's.

    Args:
        timeout: seconds that a call may take; None for no limit.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self.deadline = Deadline(timeout)
        self._asking = False
        self._where = ""
        self._trace: str | None = None
        self._words: Callable[[str], Mapping[str, str]] = lambda error: {}

    def ask(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Return what `function`, which a setting names `name`, returns for `args`; within another such call it has
        that one's time and name.

        Raises:
            UserCodeError: it raised (that is the cause), tried to end the process, or took too long.
            ConfigError: its time cannot be kept, because no process can be started.
        """
        if self._asking:
            return function(*args)
        seconds = self.deadline.seconds
        late = UserCodeError(
            name, f"no answer after {seconds} s", f"one within {seconds} s (monitors.timeout)", f"{LATE}."
        )
        hung = f"{late} It hung in code that cannot be interrupted. {self._where}".strip()

        def called() -> Any:
            try:
                return function(*args)
            except ApportionError:
                raise
            except (Exception, SystemExit) as error:
                raise raised(name, error) from error

        self._asking = True
        try:
            return self.deadline.call(called, error=hung, files=self._words(hung), trace=self._trace)
        except TimedOut as error:
            raise late from error
        except OSError as error:
            got, fix = f"{seconds} ({error})", "Set it to null: then nothing keeps the time."
            raise ConfigError("monitors.timeout", got, "a process to keep the time in", fix) from error
        finally:
            self._asking = False

    def leave(
        self, files: Mapping[str, str], where: str, trace: str, words: Callable[[str], Mapping[str, str]]
    ) -> None:
        """Say what is left behind if a call has to be ended together with the process: `files` ({path: text}), those
        that `words` makes of the error (which is told `where` they lie), and at path `trace` where Python was."""
        self.deadline.leave(files)
        self._where, self._trace, self._words = where, trace, words


def raised(name: str, error: BaseException) -> UserCodeError:
    """Return the error that says that the user's `name` raised `error`."""
    said = f"{type(error).__name__}: {error}"
    said = said if len(said) <= LONGEST else said[:LONGEST] + "…"
    return UserCodeError(name, said, "what it promises to return", f"{RAISED}.")


def check_given(name: str, made: Any, mask: Tensor) -> Tensor:
    """Return the evidence that a user's function gave for rollouts with `mask` (B,T).

    Raises:
        DataError: it is no tensor whose first dimension is the batch.
        ScoreError: it is not finite where it counts; it names the rollout.
    """
    field = f"evidence[{name!r}]"
    if not isinstance(made, Tensor) or made.dim() == 0 or len(made) != len(mask):
        got = f"a tensor {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
        fix = f"Return one tensor whose first dimension is the batch, {len(mask)} rows."
        raise DataError(field, got, "a tensor (B,), (B,T) or (B,T,k)", fix)
    fine = torch.isfinite(made)
    if made.shape[:2] == mask.shape:
        fine = fine | ~(mask if made.dim() == 2 else mask[..., None])
    bad = ~fine.reshape(len(made), -1).all(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        value = float(made[row][~fine[row]].flatten()[0]) if made.dim() > 1 else float(made[row])
        raise ScoreError(field, value, "a finite number", f"{RAISED}.", row=row)
    return made


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
            got = f"{name}, which returned a {type(made).__name__}"
            raise ConfigError("credit", got, "a pair: rewards (B,T) and a state", CHECK)
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
        got = f"{name}, which raised {said} ({Path(last.filename).name}, line {last.lineno})"
        raise ConfigError("credit", got, "rewards (B,T) and a state", CHECK) from error


def _state(name: str, state: Any) -> State:
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        got = f"{name}, whose state is a {type(state).__name__}"
        raise ConfigError("credit", got, "a dict of tensors as its state", CHECK)
    return state


def _check_rewards(name: str, rewards: Any, mask: Tensor) -> None:
    shape = tuple(mask.shape)
    if not isinstance(rewards, Tensor) or tuple(rewards.shape) != shape or not rewards.is_floating_point():
        tensor = isinstance(rewards, Tensor)
        got = f"{rewards.dtype} {tuple(rewards.shape)}" if tensor else f"a {type(rewards).__name__}"
        raise ConfigError("credit", f"{name}, which returned {got}", f"float rewards {shape}", CHECK)
    bad = mask & ~torch.isfinite(rewards)
    if bad.any():
        row, token = (int(i) for i in bad.nonzero()[0])
        number, fix = float(rewards[row, token]), f"A failure never becomes a reward. {CHECK}"
        raise ScoreError(f"credit from {name}", number, "a finite number", fix, row=row, token=token)


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
            got = f"{name}, which returned {_kind(given if hasattr(made, field) else made)}"
            expected = f"Advantages(advantages, returns), each a float tensor {shape} on {mask.device}"
            raise ConfigError(f"advantages ({field})", got, expected, "Fix the estimator.")
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
            got = f"{names}, which returned {pair!r:.80}"
            raise ConfigError(f"{kind} (stats {name})", got, expected, "Fix its `stats`.")
    return {name: float(total / torch.clamp_min(count, 1)) for name, (total, count) in pairs}


def user_defined_names(specs: Any) -> list[str]:
    """Return every "package.module:function" in nested specs, other than apportion's own."""
    if isinstance(specs, Mapping):
        return user_defined_names([*specs.keys(), *specs.values()])
    if isinstance(specs, (list, tuple, set, frozenset)):
        return [name for item in specs for name in user_defined_names(item)]
    given = isinstance(specs, str) and USER_DEFINED.fullmatch(specs) and not specs.startswith("apportion.")
    return [specs] if given else []


def check_rows(name: str, values: Tensor, mask: Tensor) -> Tensor:
    """Return `values` (B,T). Raises ScoreError that names the first rollout where they are not finite on `mask`."""
    bad = (mask & ~torch.isfinite(values)).any(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        got = float(values[row][mask[row] & ~torch.isfinite(values[row])][0])
        raise ScoreError(name, got, "finite numbers", "A failure never becomes a reward: fix what gave it.", row=row)
    return values


class Validated:
    """A segmenter or estimator whose result is validated at every call; all else is its own."""

    def __init__(self, method: Any, validate: Callable[[Any, Rollouts], Any]) -> None:
        self.method, self.validate = method, validate

    def __call__(self, *given: Any) -> Any:
        return self.validate(self.method(*given), given[-1])  # the rollouts come last

    def __getattr__(self, key: str) -> Any:
        return getattr(self.method, key)


def validated(method: Method) -> Method:
    """Return `method` with the results of its credit, segmenter and estimator validated where they are made."""
    plain = method.credit.assign

    def assign(rollouts: Rollouts, rewards: Tensor, state: State) -> tuple[Tensor, State]:
        made, state = plain(rollouts, rewards, state)
        return check_rows("rewards", made, rollouts.mask), state

    def estimated(made: Any, rollouts: Rollouts) -> Advantages:
        return check_estimated(method.specs, made, rollouts.mask)

    def segmented(made: Any, rollouts: Rollouts) -> Tensor:
        return check_segments(made, rollouts.mask)

    return method._replace(
        credit=method.credit._replace(assign=assign),
        segment=cast(Segmenter, Validated(method.segment, segmented)),
        estimate=cast(Estimator, Validated(method.estimate, estimated)),
    )
