"""Python functions in TRL's signature as reward sources: `fn(prompts, completions, completion_ids, **columns)`."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from typing import Any

from apportion import registry
from apportion.errors import ApportionError, ConfigError, UserCodeError
from apportion.evidence.process import listed
from apportion.rewards.source import Batch, Columns
from apportion.user_code import error_of

GIVEN = ("prompts", "completions", "completion_ids")
NOT_COLUMNS = frozenset({*GIVEN, "prompt", "completion"})  # of a row, as in TRL: `**columns` does not get them


class FunctionSource:
    """A user-supplied function of completions; see `RewardSource`.

    It is called with keywords: those of `GIVEN` that its signature names, and the columns of the prompts' rows that it
    names; `**columns` gets all of them. It may be a coroutine function.
    """

    user_supplied = may_be_dense = True

    def __init__(self, name: str) -> None:
        """Import the function "package.module:function".

        Raises:
            ConfigError: it cannot be imported, or has parameters that are positional only.
        """
        self.name = name
        self.function: Callable[..., Any] = registry.find("rewards", name, {})
        self._accepted, required = _keywords(name, self.function)
        columns = None if self._accepted is None else self._accepted - set(GIVEN)
        self.columns = Columns(columns, required - set(GIVEN))

    def __call__(self, batch: Batch) -> Any:
        """Return the function's answers, or an awaitable of them. Raises UserCodeError, with the rollout if one fails.

        After an exception the function is called once more for each rollout alone, to name the one that it fails for.
        """
        try:
            answers = self._call(batch)
        except ApportionError:
            raise
        except (Exception, SystemExit) as error:
            raise self._named(error, self._failing(batch)) from error
        return self._awaited(answers, batch) if inspect.isawaitable(answers) else answers

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Check nothing: what a cell may hold is known to the function only."""

    def _call(self, batch: Batch) -> Any:
        # copies: what a function changes of its arguments (an end token cut off, say) would reach the next one as well
        given = {"prompts": batch.prompts, "completions": batch.completions, "completion_ids": batch.ids}
        keywords: dict[str, Any] = {
            k: [deepcopy(one) for one in v] for k, v in given.items() if self._accepted is None or k in self._accepted
        }
        names = frozenset[str]().union(*batch.rows)
        taken = names - NOT_COLUMNS if self._accepted is None else names & self._accepted - set(GIVEN)
        taken |= names & self.columns.required
        return listed(self.function)(
            **keywords, **{name: [deepcopy(row.get(name)) for row in batch.rows] for name in sorted(taken)}
        )

    async def _awaited(self, answers: Awaitable[Any], batch: Batch) -> Any:
        try:
            return await answers
        except ApportionError:
            raise
        except (Exception, asyncio.CancelledError) as error:  # of a task of its own: it is no Exception
            if _is_cancelled():
                raise
            alone = [await self._fails(batch.select(place)) for place in range(len(batch))]
            raise self._named(error, _only_some(alone)) from error

    async def _fails(self, batch: Batch) -> bool:
        try:
            await self._call(batch)
        except (Exception, asyncio.CancelledError):
            if _is_cancelled():
                raise
            return True
        return False

    def _failing(self, batch: Batch) -> int | None:
        alone = []
        for place in range(len(batch)):
            try:
                answers = self._call(batch.select(place))
                if inspect.iscoroutine(answers):
                    answers.close()
                alone.append(False)
            except (Exception, SystemExit):
                alone.append(True)
        return _only_some(alone)

    def _named(self, error: BaseException, row: int | None) -> UserCodeError:
        found = error_of(f"reward {self.name}", error)
        found.row = row
        return found


def _is_cancelled() -> bool:
    """Whether the current task is cancelled from outside: another reward has failed."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _only_some(failed: Sequence[bool]) -> int | None:
    """Return the first rollout that failed; None where none, or all of several, did: no single rollout is to blame."""
    if not any(failed) or (len(failed) > 1 and all(failed)):
        return None
    return list(failed).index(True)


def _keywords(name: str, function: Callable[..., Any]) -> tuple[frozenset[str] | None, frozenset[str]]:
    """Return (the keywords that a function accepts, None for any; those that it requires)."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of a compiled function
        return frozenset(GIVEN), frozenset()
    fixed = [one for one in parameters if one.kind is one.POSITIONAL_ONLY and one.default is one.empty]
    if fixed:
        got, fix = f"({', '.join(one.name for one in parameters)}, /)", "Remove the slash from its signature."
        raise ConfigError(name, got, f"parameters with names, such as {', '.join(GIVEN)}", fix)
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    required = frozenset(one.name for one in named if one.default is one.empty)
    anything = any(one.kind is one.VAR_KEYWORD for one in parameters)
    return None if anything else frozenset(one.name for one in named), required


def gather(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """Return the results of awaitables that run at the same time. Raises the first error; the others are cancelled."""

    async def all_of() -> list[Any]:
        return list(await asyncio.gather(*awaitables))

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(all_of())
    with ThreadPoolExecutor(1) as other:  # a notebook's loop runs already
        return other.submit(asyncio.run, all_of()).result()


def close(awaitables: Sequence[Any]) -> None:
    """Close coroutines that will not be awaited."""
    for one in awaitables:
        with suppress(Exception):
            one.close()
