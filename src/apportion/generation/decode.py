"""The loop that writes: prompts enter, every row takes a token a step, rows that have ended leave, others enter."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from apportion.generation.draw import allowed_, draw, refuse_unlike_numbers
from apportion.generation.step_model import StepModel, spare

LEAVE = 8  # rows leave, and others enter, when one in this many has ended
CHECK = 8  # steps between looks at which rows have ended where a look stops the device


@dataclass(frozen=True)
class Rules:
    """What a writer keeps to.

    Attributes:
        banned: (N,) ids that are never drawn.
        temperature: divides the logits.
        eos: the id that ends a response, or None: every response has the full length.
        pad: the id that stands after an ended response.
    """

    banned: Tensor
    temperature: float
    eos: int | None
    pad: int


@dataclass(frozen=True)
class Rows:
    """The rows in the batch, each (n,): rollout, tokens written, last token, its position, not yet ended."""

    rollout: Tensor
    written: Tensor
    token: Tensor
    position: Tensor
    live: Tensor

    def __getitem__(self, rows: Tensor) -> Rows:
        """Return some of the rows."""
        return Rows(*(t[rows] for t in (self.rollout, self.written, self.token, self.position, self.live)))

    def beside(self, other: Rows) -> Rows:
        """Return these rows and `other` behind them."""
        pairs = ((getattr(self, n), getattr(other, n)) for n in ("rollout", "written", "token", "position", "live"))
        return Rows(*(torch.cat(pair) for pair in pairs))


@dataclass
class Responses:
    """What was written, by rollout: ids (N,T+1) and log-probabilities; the last column takes what ended rows write."""

    ids: Tensor
    logprobs: Tensor
    mask: Tensor

    @staticmethod
    def empty(rollouts: int, tokens: int, pad: int, device: torch.device) -> Responses:
        """Return nothing written yet."""
        ids = torch.full((rollouts, tokens + 1), pad, device=device)
        mask = torch.zeros(ids.shape, dtype=torch.bool, device=device)
        return Responses(ids, torch.zeros(ids.shape, device=device), mask)

    def finished(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (ids, log-probabilities, mask), each (N,T), T as long as the longest response."""
        length = int(self.mask[:, :-1].any(dim=0).sum())
        return self.ids[:, :length], self.logprobs[:, :length], self.mask[:, :length]


@dataclass
class Decoder:
    """Writes responses to `prompts`, `copies` each, with at most `rows` in the batch.

    Every rollout draws with its own uniforms (N,T), so that what it writes does not depend on which rows it shares the
    batch with, nor on when it entered.
    """

    writer: StepModel
    prompts: Sequence[Sequence[int]]
    copies: int
    rows: int
    rules: Rules
    uniforms: Tensor
    waiting: deque[tuple[int, range]] = field(default_factory=deque)  # (prompt, its rollouts), entering together

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (ids (N,T), log-probabilities, mask) of all rollouts in order, T as long as the longest.

        Raises:
            ModelError: a log-probability is not a finite number.
        """
        total, tokens = self.uniforms.shape
        self.out = Responses.empty(total, tokens, self.rules.pad, self.uniforms.device)
        for prompt in range(len(self.prompts)):
            mine = range(prompt * self.copies, (prompt + 1) * self.copies)
            self.waiting.extend((prompt, mine[i : i + self.rows]) for i in range(0, self.copies, self.rows))
        rows, steps = self._enter(None), 0
        while True:
            steps += 1
            if steps % CHECK == 0 or rows.live.device.type == "cpu":
                kept = self._leave(rows)
                if kept is None:
                    break
                rows = kept
            logits = self.writer.step(rows.token, rows.position)
            rows = self._choose(replace(rows, position=rows.position + 1), logits)
        ids, logprobs, mask = self.out.finished()
        everyone = torch.arange(total, device=mask.device)
        refuse_unlike_numbers(torch.where(mask, logprobs, 0.0).sum(dim=1), everyone)
        return ids, logprobs, mask

    def _choose(self, rows: Rows, logits: Tensor) -> Rows:
        """Draw the next token of every row from `logits` (n,V), note it, and return the rows after it."""
        last = self.uniforms.shape[1]
        uniforms = self.uniforms[rows.rollout, rows.written.clamp_max(last - 1)]
        ids, logprobs = draw(allowed_(logits, self.rules.banned, self.rules.temperature), uniforms)
        if logits.device.type == "cpu":
            refuse_unlike_numbers(logprobs.masked_fill(~rows.live, 0.0), rows.rollout)
        at = rows.rollout, torch.where(rows.live, rows.written, last)
        self.out.ids[at], self.out.logprobs[at], self.out.mask[at] = ids, logprobs, rows.live
        written = rows.written + 1
        live = rows.live & (written < last)
        if self.rules.eos is not None:
            live = live & (ids != self.rules.eos)
        return replace(rows, written=written, token=torch.where(live, ids, self.rules.pad), live=live)

    def _leave(self, rows: Rows) -> Rows | None:
        """Return the rows to go on with, after those that ended have left and others entered; None when all is done."""
        live = int(rows.live.sum())
        ended, room = len(rows.live) - live, self.rows - live
        if live == 0 and not self.waiting:
            return None
        enters = bool(self.waiting) and (live == 0 or (self.writer.past.open and self._pays(room)))
        if ended and (enters or ended * LEAVE >= len(rows.live)):
            stay = rows.live.nonzero()[:, 0]
            self.writer.past.keep(stay)
            rows = rows[stay]
        return self._enter(rows) if enters else rows

    def _pays(self, room: int) -> bool:
        """Whether those that wait can enter, enough of them to read their prompts together."""
        return room >= max(len(self.waiting[0][1]), min(self.rows // LEAVE, sum(len(r) for _, r in self.waiting)))

    def _enter(self, rows: Rows | None) -> Rows:
        """Let as many rollouts in as there is room for, each prompt read once, and draw their first tokens."""
        room = self.rows - (0 if rows is None else len(rows.rollout))
        entering: list[tuple[int, range]] = []
        while self.waiting and len(self.waiting[0][1]) <= room:
            entering.append(self.waiting.popleft())
            room -= len(entering[-1][1])
        device = self.uniforms.device
        ids, mask = left_pad([self.prompts[prompt] for prompt, _ in entering], self.rules.pad, spare(device))
        counts = torch.tensor([len(mine) for _, mine in entering], device=device)
        source = torch.arange(len(entering), device=device).repeat_interleave(counts)
        rollout = torch.tensor([i for _, mine in entering for i in mine], device=device)
        mask = mask.to(device)
        logits = self.writer.read(ids.to(device), mask, source)
        start = torch.zeros_like(rollout)
        new = Rows(rollout, start, start, mask.sum(dim=1)[source] - 1, start == 0)
        new = self._choose(replace(new, position=new.position + 1), logits)
        return new if rows is None or not len(rows.rollout) else rows.beside(new)


def left_pad(rows: Sequence[Sequence[int]], pad: int, more: int = 0) -> tuple[Tensor, Tensor]:
    """Return (ids (B,P) int64, mask (B,P) bool), P the longest row and `more`, pads on the left."""
    width = max(len(row) for row in rows) + more
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width)[None, :] >= width - lengths[:, None]
