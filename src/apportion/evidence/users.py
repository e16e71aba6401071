"""Functions of the user's that give rewards or evidence: called in the time that they have, their failures named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from apportion.deadline import Deadline, TimedOut
from apportion.errors import ApportionError, ConfigError, DataError, ScoreError, UserCodeError, message

LONGEST = 300  # characters of a user's error in ours; the traceback has the rest
RAISED = "A failure never becomes a reward: mend the function, or have it return a number for such a text"
LATE = "Give the function a time limit of its own for what it waits for, or raise guards.timeout"


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
        late = message(name, f"no answer after {seconds} s", f"one within {seconds} s (guards.timeout)", f"{LATE}.")
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
            raise UserCodeError(late) from error
        except OSError as error:
            came, mend = f"{seconds} ({error})", "Set it to null: then nothing keeps the time."
            raise ConfigError(message("guards.timeout", came, "a process to keep the time in", mend)) from error
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
    return UserCodeError(message(name, said, "what it promises to return", f"{RAISED}."))


def check_given(name: str, made: Any, mask: Tensor) -> Tensor:
    """Return the evidence that a user's function gave for rollouts with `mask` (B,T).

    Raises:
        DataError: it is no tensor whose first dimension is the batch.
        ScoreError: it is not finite where it counts; it names the rollout.
    """
    field = f"evidence[{name!r}]"
    if not isinstance(made, Tensor) or made.dim() == 0 or len(made) != len(mask):
        came = f"a tensor {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
        mend = f"Return one tensor whose first dimension is the batch, {len(mask)} rows."
        raise DataError(message(field, came, "a tensor (B,), (B,T) or (B,T,k)", mend))
    fine = torch.isfinite(made)
    if made.shape[:2] == mask.shape:
        fine = fine | ~(mask if made.dim() == 2 else mask[..., None])
    bad = ~fine.reshape(len(made), -1).all(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        value = float(made[row][~fine[row]].flatten()[0]) if made.dim() > 1 else float(made[row])
        raise ScoreError(message(f"{field} of rollout {row}", value, "a finite number", f"{RAISED}."))
    return made
