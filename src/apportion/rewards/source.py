"""The protocol of a reward source, the batch it is called with, and the answers it gives, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from apportion.data.conversations import Turn
from apportion.errors import DataError, ScoreError
from apportion.evidence import Models
from apportion.evidence.models import SOURCE_ROW
from apportion.evidence.process import finite_number, is_list, to_tokens
from apportion.types import Rollouts
from apportion.user_code import plain

Text = str | list[Turn]


class Columns(NamedTuple):
    """The columns of the prompts' rows that a source takes.

    Attributes:
        accepted: their names; None for all. required: those without which it cannot be called.
    """

    accepted: frozenset[str] | None = frozenset()
    required: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Batch:
    """Rollouts as text, one entry a rollout in each list.

    Attributes:
        models, rollouts: the run's models, and the rollouts themselves.
        prompts: text, or the messages of a conversation that was not cut.
        completions: text without special tokens, or, after messages, one message of the assistant in a list.
        ids: the sampled ids, the end token included. texts: the completions, always as text.
        rows: the columns of the prompts' rows.
    """

    models: Models
    rollouts: Rollouts
    prompts: Sequence[Text]
    completions: Sequence[Text]
    ids: Sequence[list[int]]
    texts: Sequence[str]
    rows: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        """Return the number of rollouts."""
        return len(self.ids)

    def select(self, place: int) -> Batch:
        """Return the batch of one rollout."""
        lists = (self.prompts, self.completions, self.ids, self.texts, self.rows)
        rollouts = self.rollouts.select(torch.tensor([place], device=self.rollouts.mask.device))
        prompts, completions, ids, texts, rows = ([one[place]] for one in lists)
        return Batch(self.models, rollouts, prompts, completions, ids, texts, rows)  # type: ignore[arg-type]


class RewardSource(Protocol):
    """One reward: called with a batch, it returns an answer a rollout, or an awaitable of them.

    An answer is a number, None where the reward does not apply, or a list of one number a sampled token.

    Attributes:
        name: what errors call it. columns: those of the prompts' rows that it takes.
        user_supplied: whether its call has the time limit of user-supplied functions.
        may_be_dense: whether it may answer with a number a token.
    """

    name: str
    columns: Columns
    user_supplied: bool
    may_be_dense: bool

    def __call__(self, batch: Batch) -> Any:
        """Return the answers."""

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raise DataError for a row whose columns it cannot use, before anything is loaded."""


class Scores(NamedTuple):
    """Checked answers: values (B,), NaN where the reward does not apply, and dense rewards (B,T) or None.

    Where a rollout's answer is a list, its value is the sum of it; `dense` holds the numbers, 0 on other rows.
    """

    values: Tensor
    dense: Tensor | None


def make_batch(models: Models, rollouts: Rollouts) -> Batch:
    """Return the rollouts as text: what the policy saw as the prompt, and what it sampled."""
    decode = models.policy.tokenizer.decode
    prompts: list[Text] = []
    completions: list[Text] = []
    ids, texts = [], []
    for row in range(len(rollouts)):
        before = rollouts.prompt_ids[row][rollouts.prompt_mask[row]].tolist()
        sampled = rollouts.response_ids[row][rollouts.mask[row]].tolist()
        text = str(decode(sampled, skip_special_tokens=True))
        turns = models.conversations.get(tuple(before))
        prompts.append(str(decode(before, skip_special_tokens=True)) if turns is None else [dict(one) for one in turns])
        completions.append(text if turns is None else [{"role": "assistant", "content": text}])
        ids.append(sampled)
        texts.append(text)
    return Batch(models, rollouts, prompts, completions, ids, texts, rows_of(models, rollouts))


def rows_of(models: Models, rollouts: Rollouts) -> list[Mapping[str, Any]]:
    """Return the columns of the prompts' rows, one mapping a rollout; empty ones where none were kept."""
    if SOURCE_ROW not in rollouts.evidence or not models.columns:
        return [{} for _ in range(len(rollouts))]
    return [models.columns[place] for place in rollouts.evidence[SOURCE_ROW].tolist()]


def check_answers(name: str, answers: Any, mask: Tensor) -> Scores:
    """Return the answers of the source `name` for rollouts with `mask` (B,T).

    Lists, arrays and tensors of every number format count alike, and booleans are 0 and 1. An array (B,T) holds a
    number at each position, those off the mask ignored.

    Raises:
        DataError: not B answers.
        ScoreError: one that is no finite number, None, or list of one finite number a sampled token; it names the
            rollout.
    """
    if tuple(getattr(answers, "shape", ())) == tuple(mask.shape) and mask.shape[1] > 1:
        dense = to_tokens(answers, mask, None, name)
        return Scores(dense.sum(dim=1), dense)
    given = plain(answers)
    if not is_list(given) or len(given) != len(mask):
        got = f"{len(given)} rewards" if is_list(given) else f"a {type(given).__name__}"
        fix = "Return one a completion, in their order; None where the reward does not apply."
        raise DataError(f"the result of {name}", got, f"a list of {len(mask)} rewards", fix)
    values = torch.full((len(mask),), torch.nan, device=mask.device)
    found: Tensor | None = None
    for row, answer in enumerate(given):
        if answer is None:
            continue
        if is_list(answer):
            found = torch.zeros(mask.shape, device=mask.device) if found is None else found
            found[row] = _dense(name, answer, mask, row)
            values[row] = found[row].sum()
        else:
            values[row] = finite_number(f"reward from {name}", row, None, answer)
    return Scores(values, found)


def _dense(name: str, answer: Any, mask: Tensor, row: int) -> Tensor:
    """Return the numbers (T,) of one rollout, which `answer` lists by sampled token."""
    try:
        return to_tokens([list(answer)], mask[row : row + 1], None, name)[0]
    except ScoreError as error:
        error.row = row
        raise
