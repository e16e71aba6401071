"""User-supplied methods and functions: time limits, validation of their results, errors that name them."""

from __future__ import annotations

import inspect
import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apportion.errors import ApportionError, ConfigError, DataError, ScoreError, UserCodeError
from apportion.segments import check as check_segments
from apportion.system.time_limit import TimedOut, time_limit
from apportion.types import Advantages, Credit, Method, Rollouts, State

USER_DEFINED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # package.module:function
MAX_TEXT = 300  # characters of a user's error in ours; the traceback has the rest
NEVER = "A failure never becomes a reward: fix the function, or have it return a number for such a text."
LATE = "Give the function a time limit of its own for what it waits for, or raise"
CHECK = "Check it with `apportion doctor --credit NAME`."


@dataclass(frozen=True)
class FilesOnKill:
    """Files to save if a call has to be ended together with the process.

    Attributes:
        place: a sentence that says where. files: {path: text} for the text of the error. trace: path of the traceback.
    """

    place: str = ""
    files: Callable[[str], Mapping[str, str]] = lambda error: {}
    trace: str | None = None


class UserCode:
    """Calls user-supplied functions.

    Attributes:
        timeout: seconds that a call may take; None for no limit. setting: where it is from, for errors.
        files_on_kill: of the current batch.
    """

    def __init__(self, timeout: float | None = None, setting: str = "monitors.timeout") -> None:
        self.timeout, self.setting, self.files_on_kill = timeout, setting, FilesOnKill()
        self._running = False

    def call(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(*args)`; `name` is what the settings call it. A call inside another one shares its time.

        Raises:
            UserCodeError: it raised (that is the cause), tried to end the process, or took too long.
            ConfigError: its time cannot be limited, because no process can be started.
        """
        if self._running or self.timeout is None:
            return call_named(name, function, *args)
        hung = f"{LATE} {self.setting}. It hung in code that cannot be interrupted. {self.files_on_kill.place}".strip()
        message = str(self._late(name, hung))
        self._running = True
        try:
            with time_limit(self.timeout, message, self.files_on_kill.files(message), self.files_on_kill.trace):
                return call_named(name, function, *args)
        except TimedOut as error:
            raise self._late(name, f"{LATE} {self.setting}.") from error
        except OSError as error:
            got, fix = f"{self.timeout} ({error})", "Set it to null: then there is no time limit."
            raise ConfigError(self.setting, got, "a process that keeps the time", fix) from error
        finally:
            self._running = False

    def _late(self, name: str, fix: str) -> UserCodeError:
        expected = f"one within {self.timeout} s ({self.setting})"
        return UserCodeError(name, f"no answer after {self.timeout} s", expected, fix)


def call_named(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`. Raises UserCodeError that names it for any error but ours.

    What it changes of the process (gradients switched off, threads, the working folder) ends with the call.
    """
    with _as_before():
        try:
            return function(*args)
        except ApportionError:
            raise
        except (Exception, SystemExit) as error:
            raise error_of(name, error) from error


@contextmanager
def _as_before() -> Iterator[None]:
    """Put torch's modes, its threads and the working folder back at the end of the block."""
    gradients, kind, device = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    threads, folder = torch.get_num_threads(), ""
    with suppress(OSError):  # a folder that was removed
        folder = os.getcwd()
    exact = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(kind)
        if torch.get_default_device() != device:
            torch.set_default_device(None)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(exact[0], warn_only=exact[1])
        if folder:
            os.chdir(folder)


def error_of(name: str, error: BaseException) -> UserCodeError:
    """Return the error that says that the user-supplied `name` raised `error`, and where."""
    text = f"{type(error).__name__}: {error}"
    text = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return UserCodeError(name, f"{text}{where}", "a result without an exception", NEVER)


class Keywords(NamedTuple):
    """What a function takes beyond its first three arguments.

    Attributes:
        accepted: names of its keywords; None for any. required: those without a default.
        positional: names of the first three, which no keyword may have.
    """

    accepted: frozenset[str] | None
    required: frozenset[str]
    positional: frozenset[str]


def keyword_names(function: Callable[..., Any]) -> Keywords:
    """Return the keywords that a user-supplied function takes beyond the three arguments that it is called with."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of a compiled function
        return Keywords(frozenset(), frozenset(), frozenset())
    first = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)][:3]
    rest = [one for one in parameters if one not in first]
    named = {one.name: one for one in rest if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    required = frozenset(name for name, one in named.items() if one.default is one.empty)
    anything = any(one.kind is one.VAR_KEYWORD for one in rest)
    positional = frozenset(one.name for one in first if one.kind is one.POSITIONAL_OR_KEYWORD)
    return Keywords(None if anything else frozenset(named), required, positional)


def plain(value: Any) -> Any:
    """Return arrays, tensors and their scalars in `value`, or in a list that it is, as Python's lists and numbers."""
    if isinstance(value, (str, bytes, Mapping)):
        return value
    if callable(getattr(value, "tolist", None)):
        listed = value.tolist()
        return plain(listed) if isinstance(listed, list) else listed  # an array of objects may hold further arrays
    if isinstance(value, (list, tuple)):
        made = [plain(one) for one in value]
        return tuple(made) if isinstance(value, tuple) else made
    return value


def user_defined(names: Iterable[str]) -> str | None:
    """Return the first "package.module:function" of `names`, None without one."""
    return next((name for name in names if ":" in name), None)


def user_defined_names(specs: Any) -> list[str]:
    """Return every "package.module:function" in nested specs, other than apportion's own."""
    if isinstance(specs, Mapping):
        return user_defined_names([*specs.keys(), *specs.values()])
    if isinstance(specs, (list, tuple, set, frozenset)):
        return [name for item in specs for name in user_defined_names(item)]
    is_name = isinstance(specs, str) and USER_DEFINED.fullmatch(specs) and not specs.startswith("apportion.")
    return [specs] if is_name else []


# guarding methods where they are built


def guard_credit(name: str, credit: Credit, code: UserCode | None = None) -> Credit:
    """Return `credit` guarded where `name` is user-supplied, "package.module:function"; another one is itself.

    Every function has its time and errors that name it; `init`, `assign` and `update` are validated. They raise:
        UserCodeError: as `UserCode.call`. ConfigError: not rewards (B,T) and a state.
        ScoreError: a reward on the mask is not finite; it names rollout and token.
    """
    if user_defined([name]) is None:
        return credit
    call = partial((code or UserCode()).call, name)

    def init() -> State:
        return validate_state(name, call(credit.init))

    def assign(rollouts: Rollouts, rewards: Tensor, state: State) -> tuple[Tensor, State]:
        result = call(credit.assign, rollouts, rewards, state)
        if not isinstance(result, tuple) or len(result) != 2:
            got = f"{name}, which returned a {type(result).__name__}"
            raise ConfigError("credit", got, "a pair: rewards (B,T) and a state", CHECK)
        return validate_rewards(name, result[0], rollouts.mask), validate_state(name, result[1])

    def update(state: State, sums: Any) -> State:
        assert credit.update is not None
        return validate_state(name, call(credit.update, state, sums))

    def limited(function: Callable[..., Any] | None) -> Any:
        return None if function is None else partial(call, function)

    return credit._replace(
        init=init,
        assign=assign,
        share=limited(credit.share),
        stats=limited(credit.stats),
        update=None if credit.update is None else update,
    )


def guard_method(method: Method, code: UserCode) -> Method:
    """Return `method` with validated results, and the time of `code` for each of its user-supplied parts."""
    credit = method.credit
    name = user_defined(name for spec in method.specs["credit"] for name in spec)
    if name is not None:  # a chain of guarded credits: the call of the chain has the time
        call = partial(code.call, name)
        parts = ("init", "assign", "share", "stats", "update")
        functions: dict[str, Any] = {key: getattr(credit, key) for key in parts}
        limited: dict[str, Any] = {key: partial(call, function) for key, function in functions.items() if function}
        credit = credit._replace(**limited)
    plain = credit.assign

    def assign(rollouts: Rollouts, rewards: Tensor, state: State) -> tuple[Tensor, State]:
        rewards, state = plain(rollouts, rewards, state)
        return check_rows("rewards", rewards, rollouts.mask), state

    def segments(result: Any, rollouts: Rollouts) -> Tensor:
        return check_segments(result, rollouts.mask)

    def estimated(result: Any, rollouts: Rollouts) -> Advantages:
        return validate_estimate(method.specs, result, rollouts.mask)

    names = {kind: user_defined(n for spec in method.specs[kind] for n in spec) for kind in ("segments", "advantages")}
    segment: Any = Guarded(names["segments"], method.segment, code, segments)
    estimate: Any = Guarded(names["advantages"], method.estimate, code, estimated)
    return method._replace(credit=credit._replace(assign=assign), segment=segment, estimate=estimate)


def call_directly(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`."""
    return function(*args)


class Guarded:
    """A segmenter or estimator with a validated result and, where `name` is not None, a time limit on its functions."""

    def __init__(self, name: str | None, method: Any, code: UserCode, validate: Callable[[Any, Rollouts], Any]) -> None:
        self.method, self._validate = method, validate
        self._call: Callable[..., Any] = call_directly if name is None else partial(code.call, name)

    def __call__(self, *args: Any) -> Any:
        return self._validate(self._call(self.method, *args), args[-1])  # the rollouts come last

    def __getattr__(self, key: str) -> Any:
        value = getattr(self.method, key)
        return partial(self._call, value) if key == "stats" else value


# validation of results


def check_rows(name: str, values: Tensor, mask: Tensor) -> Tensor:
    """Return `values` (B,T). Raises ScoreError that names the first rollout and token on `mask` that is not finite."""
    bad = mask & ~torch.isfinite(values)
    if bad.any():
        row, token = (int(i) for i in bad.nonzero()[0])
        raise ScoreError(name, float(values[row, token]), "a finite number", NEVER, row=row, token=token)
    return values


def validate_state(name: str, state: Any) -> State:
    """Return the state of a user-supplied credit. Raises ConfigError where it is not a dict of tensors."""
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        got = f"{name}, whose state is a {type(state).__name__}"
        raise ConfigError("credit", got, "a dict of tensors as its state", CHECK)
    return state


def validate_rewards(name: str, rewards: Any, mask: Tensor) -> Tensor:
    """Return the rewards (B,T) of a user-supplied credit. Raises ConfigError for another type or shape, ScoreError."""
    shape = tuple(mask.shape)
    if not isinstance(rewards, Tensor) or tuple(rewards.shape) != shape or not rewards.is_floating_point():
        got = (
            f"{rewards.dtype} {tuple(rewards.shape)}" if isinstance(rewards, Tensor) else f"a {type(rewards).__name__}"
        )
        raise ConfigError("credit", f"{name}, which returned {got}", f"float rewards {shape}", CHECK)
    return check_rows(f"credit from {name}", rewards, mask)


def validate_evidence(name: str, evidence: Any, mask: Tensor) -> Tensor:
    """Return the evidence that a user-supplied function made for rollouts with `mask` (B,T): a tensor, or as `plain`.

    Raises:
        DataError: it is not a tensor whose first dimension is the batch.
        ScoreError: it is not finite where it counts; it names the rollout.
    """
    field = f"evidence[{name!r}]"
    evidence = as_tensor(evidence, mask.device)
    if not isinstance(evidence, Tensor) or evidence.dim() == 0 or len(evidence) != len(mask):
        got = f"a tensor {tuple(evidence.shape)}" if isinstance(evidence, Tensor) else type(evidence).__name__
        fix = f"Return one tensor whose first dimension is the batch, {len(mask)} rows."
        raise DataError(field, got, "a tensor (B,), (B,T) or (B,T,k)", fix)
    bad = ~torch.isfinite(evidence)
    if evidence.shape[:2] == mask.shape:
        bad = bad & (mask if evidence.dim() == 2 else mask[..., None])
    if bad.any():
        at = tuple(int(i) for i in bad.nonzero()[0])
        raise ScoreError(field, float(evidence[at]), "a finite number", NEVER, row=at[0])
    return evidence


def as_tensor(value: Any, device: torch.device) -> Any:
    """Return arrays and lists of numbers as a float32 tensor on `device`, and any other value as it is."""
    if isinstance(value, Tensor):
        return value
    numbers = plain(value)
    if not isinstance(numbers, (list, tuple)):
        return value
    try:
        return torch.tensor(numbers, dtype=torch.float32, device=device)
    except (TypeError, ValueError, RuntimeError):  # None, text, or rows of different lengths
        return value


def validate_estimate(specs: Mapping[str, Any], estimate: Any, mask: Tensor) -> Advantages:
    """Return what the estimator of `specs` returned for rollouts with `mask` (B,T).

    Raises:
        ConfigError: it is not a pair advantages, returns of float tensors (B,T) on the rollouts' device.
    """
    name, shape = next(iter(specs["advantages"][0])), tuple(mask.shape)
    for field in Advantages._fields:
        values: Any = getattr(estimate, field, None)
        fits = isinstance(values, Tensor) and values.is_floating_point() and values.device == mask.device
        if not fits or tuple(values.shape) != shape:
            got = f"{name}, which returned {_kind(values if hasattr(estimate, field) else estimate)}"
            expected = f"Advantages(advantages, returns), each a float tensor {shape} on {mask.device}"
            raise ConfigError(f"advantages ({field})", got, expected, "Fix the estimator.")
    return Advantages(estimate.advantages, estimate.returns)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} on {value.device}"
    return f"a {type(value).__name__}"


def means(specs: Mapping[str, Any], kind: str, sums: Any) -> dict[str, float]:
    """Return {name: sum / count} of {name: (sum (), count ())}, which the `stats` of the methods of `kind` returned.

    Raises:
        ConfigError: they returned something else.
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
