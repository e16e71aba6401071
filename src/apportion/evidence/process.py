"""User-supplied process rewards, one number a token, a step or a response, validated by content and placed on (B,T)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from decimal import Decimal
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from apportion import registry
from apportion.data import BadRows, Prompt
from apportion.errors import ConfigError, DataError, ScoreError, Shown
from apportion.evidence.models import SOURCE_ROW, Models, Scorer
from apportion.generation.prompts import load_prompts
from apportion.registry import EvidenceKey
from apportion.segments import check
from apportion.types import Rollouts
from apportion.user_code import keyword_names, plain

Function = Callable[..., Any]
LARGEST = torch.finfo(torch.float32).max  # rewards are float32, in which a larger number is infinite


def process_evidence(models: Models, rollouts: Rollouts, needs: frozenset[str]) -> dict[str, Tensor]:
    """Return the process rewards (B,T) of the function that each need names.

    A function is called with (texts, rollouts, prompts), lists of the B rollouts' decoded responses and prompts, and
    with those columns of the prompts' rows that its signature names, each a list of B values.

    Raises:
        ConfigError: rewards of steps where `models` has no segmenter.
        DataError: another number of rows than rollouts, or a column that the function needs is not there.
        ScoreError: a row of the wrong length, or with something that is not a finite number; it names the rollout.
        UserCodeError: the function raised, or took longer than `monitors.timeout`.
    """
    decode = models.policy.tokenizer.decode
    pairs = zip(rollouts.response_ids, rollouts.mask, strict=True)
    texts = [decode(ids[mask]) for ids, mask in pairs]
    prompts = [decode(ids[mask]) for ids, mask in zip(rollouts.prompt_ids, rollouts.prompt_mask, strict=True)]
    rewards = {}
    for need in sorted(needs):
        settings = EvidenceKey.of(need).settings
        name = settings["function"]
        function = with_columns(name, registry.find("process.function", name, {}), models, rollouts)
        segments = None
        if settings.get("unit") == "step":
            if models.segment is None:
                fix = "Use unit: token, or give Models the segmenter of the run."
                raise ConfigError("process.unit", "step", "a run with segments", fix)
            segments = check(models.segment(rollouts), rollouts.mask)
        rows = models.user_code.call(name, listed(function), texts, rollouts, prompts)
        rewards[need] = to_tokens(rows, rollouts.mask, segments, name)
    return rewards


def listed(function: Function) -> Function:
    """Return `function` with what it yields, or returns as another iterator, as a list, within its own time."""

    def call(*args: Any, **keywords: Any) -> Any:
        result = function(*args, **keywords)
        return list(result) if isinstance(result, Iterator) else result

    return call


# columns of the prompts' rows


def prompts_for(
    needs: Iterable[str],
    source: str,
    bad: BadRows | None = None,
    split: str | None = None,
    logged: Iterable[str] = (),
    rewards: Scorer | None = None,
) -> list[Prompt]:
    """Return the prompts of a run with the columns of their rows that the functions in its `needs` take.

    Args:
        bad, split: as `load_prompts` takes them.
        logged: evidence that only the log has: columns that its functions take are kept where they are there.
        rewards: those of the run, which take columns too.

    Raises:
        ConfigError, DataError: as `load_prompts`, `check_columns` and `Scorer.check_columns`.
    """
    functions = user_functions(needs)
    wanted = wanted_columns(functions | user_functions(logged))
    if rewards is not None:
        wanted = None if wanted is None or rewards.wanted is None else wanted | rewards.wanted
    found = load_prompts(source, "rl", bad, wanted, split)
    columns = [prompt.columns for prompt in found]
    check_columns(functions, columns)
    if rewards is not None:
        rewards.check_columns(columns)
    return found


def user_functions(needs: Iterable[str]) -> dict[str, Function]:
    """Return {name: function} of the functions that make the evidence `needs`: process rewards, or evidence itself."""
    keys = [EvidenceKey.of(need) for need in sorted(needs)]
    names = [key.settings["function"] for key in keys if key.name == "process_rewards" and "function" in key.settings]
    names += [key.name for key in keys if ":" in key.name]
    return {name: registry.find("evidence", name, {}) for name in names}


def wanted_columns(functions: Mapping[str, Function]) -> frozenset[str] | None:
    """Return the names of the columns that `functions` take; None where one takes all."""
    accepted = [keyword_names(function).accepted for function in functions.values()]
    known = [names for names in accepted if names is not None]
    return None if len(known) < len(accepted) else frozenset[str]().union(*known)


def check_columns(functions: Mapping[str, Function], columns: Sequence[Mapping[str, Any]]) -> None:
    """Raise DataError where a function has to be given a column that no prompt's row has; names both.

    Raises:
        ConfigError: a function that cannot be called with three arguments.
    """
    present = frozenset[str]().union(*columns)
    for name, function in functions.items():
        _check_three(name, function)
        check_present(name, keyword_names(function).required - present)


def _check_three(name: str, function: Function) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a compiled function
        return
    places = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    if len(places) < 3 and not any(one.kind is one.VAR_POSITIONAL for one in parameters):
        got = f"({', '.join(one.name for one in parameters)})"
        fix = "It is called with these three, and with the columns that its further parameters name."
        expected = "a function of (texts, rollouts, prompts), or, as evidence, of (models, rollouts, texts)"
        raise ConfigError(name, got, expected, fix)


def check_present(name: str, lacking: frozenset[str]) -> None:
    """Raise DataError that names a column of the prompts' rows that the function `name` takes and they are lacking."""
    if lacking:
        fix = "Add it to the table of prompts, or give the parameter a default."
        raise DataError("prompts", f"no column {min(lacking)!r}", f"the columns that {name} takes", fix)


def with_columns(name: str, function: Function, models: Models, rollouts: Rollouts) -> Function:
    """Return `function` with those columns that it takes as keywords: lists of B values, None where a row has none.

    Raises:
        DataError: it has to be given a column, and the rollouts (of another source, say) have none of that name.
    """
    keywords, rows = keyword_names(function), list[Mapping[str, Any]]()
    if SOURCE_ROW in rollouts.evidence and models.columns:
        rows = [models.columns[place] for place in rollouts.evidence[SOURCE_ROW].tolist()]
    present = frozenset(models.columns[0]) if rows else frozenset[str]()
    check_present(name, keywords.required - present)
    taken = sorted((present if keywords.accepted is None else present & keywords.accepted) - keywords.positional)
    # copies: what it changes of a cell would be there at the next batch
    cells = {column: [deepcopy(row.get(column)) for row in rows] for column in taken}
    return partial(function, **cells) if taken else function


# results


def to_tokens(rows: Any, mask: Tensor, segments: Tensor | None, source: str) -> Tensor:
    """Return (B,T) float32 with the numbers in `rows`, one item a rollout, on the tokens of `mask` (B,T).

    Lists, tuples, arrays and tensors of every number format count alike, and booleans are 0 and 1.

    Args:
        rows: B lists of one number a token of the row, or, with `segments` (B,T) ids, one a segment, which falls on the
            segment's last token; or of pairs (token, number), the token counted among the row's own. Or B numbers,
            each on its row's last token, also as an array (B,1). Or, without segments, an array (B,T), whose numbers
            off the mask are ignored.
        source: the name used in errors.

    Raises:
        DataError, ScoreError: as `process_evidence`.
    """
    shape = tuple(getattr(rows, "shape", ()))
    whole = shape == tuple(mask.shape) and segments is None
    if shape == (len(mask), 1) and not whole and segments is None:  # a model's output layer of one row
        rows = rows[:, 0]
    rows = plain(rows)
    if not is_list(rows) or len(rows) != len(mask):
        got = f"{len(rows)} rows" if is_list(rows) else type(rows).__name__
        fix = "Return one row of numbers, or one number, a rollout."
        raise DataError(f"the result of {source}", got, f"a list of {len(mask)} rows", fix)
    field = f"process rewards from {source}"
    numbers_only = len(rows) > 0 and not any(is_list(given) for given in rows)
    alone = numbers_only and any(isinstance(given, Real | Decimal) for given in rows)
    out = torch.zeros(mask.shape, device=mask.device)
    for row, given in enumerate(rows):
        own = mask[row].nonzero()[:, 0]
        if alone:
            spots, numbers = own[-1:], [finite_number(field, row, None, given)] * min(len(own), 1)
        elif not is_list(given):
            raise ScoreError(field, given, "a list of numbers", "Return one list a rollout.", row=row)
        else:
            own_numbers = [given[place] for place in own.tolist()] if whole else list(given)
            spots, items = _placed(own_numbers, own, None if segments is None else segments[row], field, row)
            numbers = [finite_number(field, row, i, value) for i, value in enumerate(items)]
        out[row, spots] = torch.tensor(numbers, dtype=torch.float32, device=out.device)
    return out


def _placed(given: list[Any], own: Tensor, segments: Tensor | None, field: str, row: int) -> tuple[Tensor, list[Any]]:
    """Return (positions, numbers) of the list `given` of a row whose tokens are at `own` (N,)."""
    if given and all(is_list(item) for item in given):
        return _pairs(given, own, field, row)
    spots = own if segments is None else _last_of_each(segments, own)
    if len(given) != len(spots):
        expected = f"{len(spots)} numbers, one a {'token' if segments is None else 'step'}"
        raise ScoreError(field, f"{len(given)} numbers", expected, "Count the sampled tokens, EOS included.", row=row)
    return spots, given


def is_list(value: object) -> bool:
    """Whether a value is a list or another sequence that is not text."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def finite_number(field: str, row: int, place: int | None, value: object) -> float:
    """Return one of a rollout's numbers as a float. Raises ScoreError for what is no finite number of 32 bits."""
    try:
        number = float(value) if isinstance(value, Real | Decimal) else math.nan
    except OverflowError:  # an integer beyond every float
        number = math.inf
    if not abs(number) <= LARGEST:
        fix = "A failure never becomes a reward: return a number for it, or raise an error."
        where = field if place is None else f"{field}, number {place}"
        shown = Shown(f"an integer of {value.bit_length()} bits") if isinstance(value, int) else value
        expected = f"a finite number of at most {LARGEST:.2g}" if math.isfinite(number) else "a finite number"
        raise ScoreError(where, shown, expected, fix, row=row)
    return number


def _last_of_each(ids: Tensor, places: Tensor) -> Tensor:
    """Return (S,) where each segment of one row's `ids` (T,) ends."""
    on = ids[places]
    ends = torch.ones_like(on, dtype=torch.bool)
    ends[:-1] = on[1:] != on[:-1]
    return places[ends]


def _pairs(given: Sequence[Any], places: Tensor, field: str, row: int) -> tuple[Tensor, list[Any]]:
    """Return (positions, numbers) of pairs (token, number), the tokens rising. Raises ScoreError for other ones."""
    tokens = [_whole(item[0]) if len(item) == 2 else None for item in given]
    least = -1
    for place, token in enumerate(tokens):
        if token is None or not least < token < len(places):
            expected = f"pairs (token, number), tokens rising and below {len(places)}"
            raise ScoreError(f"{field}, pair {place}", given[place], expected, "Count from 0 in each row.", row=row)
        least = token
    return places[torch.tensor(tokens, dtype=torch.int64, device=places.device)], [item[1] for item in given]


def _whole(value: Any) -> int | None:
    """Return a whole number, which an array of pairs may hold as 3.0; None for another value."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        return None
    number = float(value)
    return int(number) if number.is_integer() else None
