"""Preference pairs in rows of a table: two answers to one prompt, or a ranking of several."""

from __future__ import annotations

from typing import Any, NamedTuple

from apportion.data.answers.demonstrations import Demonstration
from apportion.data.answers.ranking_rows import ASSISTANT, LEAVE_OUT, Ranking
from apportion.data.answers.rankings import RankingReader
from apportion.data.answers.rankings_to_pairs import Which, ranked_pairs
from apportion.data.formats import Row
from apportion.errors import DataError


class Pair(NamedTuple):
    """The better and the worse answer to one prompt, which both begin with."""

    chosen: Demonstration
    rejected: Demonstration


class PairReader:
    """Makes the preference pairs of each row of a table: one of a pair, several of a ranking.

    Args:
        field: the configuration key that gave the table, for error messages.
        prompt_column: name of the column with the prompt; None for "prompt", where there is one.
        which: the pairs of a ranking (`rankings_to_pairs`).

    Attributes:
        rankings: reads the rows, as for a reward model, and counts those that it left out.
        unpaired: rankings without a pair so far: all ties, or nothing judged.
    """

    def __init__(self, field: str, prompt_column: str | None = None, which: Which = "all") -> None:
        self.field, self.which, self.unpaired = field, which, 0
        self.rankings = RankingReader(field, prompt_column, calls_last=True)

    def __call__(self, row: Row) -> list[Pair]:
        """Return the pairs of `row`.

        Raises:
            ColumnError, DataError: as `RankingReader`; two texts with no common beginning as their prompt, an answer of
                several turns; with its row.
        """
        made = list[Pair]()
        for ranking in self.rankings(row):
            pairs = ranked_pairs(ranking.ranks, self.which)
            self.unpaired += not pairs
            answers = [self._demonstration(ranking, number) for number in range(len(ranking.completions))]
            made += [Pair(answers[winner], answers[loser]) for winner, loser in pairs]
        return made

    def _demonstration(self, ranking: Ranking, number: int) -> Demonstration:
        """Return one of the completions behind the prompt."""
        prompt, answer = ranking.prompt, ranking.completions[number]
        if isinstance(prompt, str):
            if not prompt.strip():
                got = "{}: chosen = {!r:.60}, rejected = {!r:.60}".format(ranking.where, *ranking.completions)
                fix = "Give the prompt in a column 'prompt', or pass --skip_bad_rows: the two cannot be compared."
                raise DataError(self.field, got, "two answers to one prompt, with which both begin", fix)
            return Demonstration(f"{prompt}{answer}", len(prompt), ranking.where)
        turns: list[dict[str, Any]] = list(answer) if not isinstance(answer, str) else [_turn(prompt, answer)]
        if len(turns) != 1:
            roles = ", ".join(str(turn.get("role")) for turn in turns)
            fix = f"Put the turns before the answer into the prompt, the same for both answers, {LEAVE_OUT}."
            got = f"{ranking.where}: an answer of the roles {roles} behind a prompt"
            raise DataError(self.field, got, "one turn, the answer", fix)
        return Demonstration(prompt.with_turns([*prompt, *turns]), len(prompt), ranking.where)


def _turn(prompt: list[dict[str, Any]], answer: str) -> dict[str, Any]:
    """Return the assistant's turn with a text, as parts of text where the prompt's turns have such."""
    parts = all(isinstance(turn.get("content"), list) for turn in prompt)
    return {"role": ASSISTANT, "content": [{"type": "text", "text": answer}] if parts else answer}
