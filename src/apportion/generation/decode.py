"""The continuous-batching decode loop: a token a row a step; finished rows leave, waiting rollouts enter."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from apportion.generation.draw import allowed_, check_logprobs, draw
from apportion.generation.step_model import StepModel, extra_padding
from apportion.generation.truncation import Truncation

LEAVE = 8  # finished rows leave, and others enter, when one in this many has ended
CHECK = 8  # steps between checks for finished rows on a device, where a check synchronises


@dataclass(frozen=True)
class SamplingRules:
    """How tokens are sampled and responses end.

    Attributes:
        banned: (N,) ids that are never sampled.
        temperature: divides the logits.
        ends: (k,) ids that end a response; none: every response has the full length.
        pad: the id after an ended response, which may be one of `ends`.
        truncation: leaves tokens out of the distribution that is drawn from; None for plain sampling.
    """

    banned: Tensor
    temperature: float
    ends: Tensor
    pad: int
    truncation: Truncation | None = None


@dataclass(frozen=True)
class Rows:
    """The rows in the batch, each (n,): rollout, tokens generated, last token, its position, not yet ended."""

    rollout: Tensor
    written: Tensor
    token: Tensor
    position: Tensor
    live: Tensor

    def __getitem__(self, rows: Tensor) -> Rows:
        """Return some of the rows."""
        return Rows(*(t[rows] for t in (self.rollout, self.written, self.token, self.position, self.live)))

    def concat(self, other: Rows) -> Rows:
        """Return these rows followed by `other`."""
        pairs = ((getattr(self, n), getattr(other, n)) for n in ("rollout", "written", "token", "position", "live"))
        return Rows(*(torch.cat(pair) for pair in pairs))


@dataclass
class Responses:
    """The generated ids and log-probabilities by rollout, (N,T+1); the last column absorbs the writes of ended rows.

    Attributes:
        truncated: log-probabilities under the truncated distribution; None for plain sampling.
    """

    ids: Tensor
    logprobs: Tensor
    mask: Tensor
    truncated: Tensor | None = None

    @staticmethod
    def empty(rollouts: int, tokens: int, pad: int, device: torch.device, truncated: bool = False) -> Responses:
        """Return empty responses."""
        ids = torch.full((rollouts, tokens + 1), pad, device=device)
        mask = torch.zeros(ids.shape, dtype=torch.bool, device=device)
        logprobs = torch.zeros(ids.shape, device=device)
        return Responses(ids, logprobs, mask, torch.zeros_like(logprobs) if truncated else None)

    def finished(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (ids, log-probabilities, mask), each (N,T), T the length of the longest response."""
        length = int(self.mask[:, :-1].any(dim=0).sum())
        return self.ids[:, :length], self.logprobs[:, :length], self.mask[:, :length]


@dataclass
class Decoder:
    """Generates responses to `prompts`, `copies` each, with at most `rows` in the batch.

    Every rollout samples with its own uniforms (N,T), so that it does not depend on the other rows of the batch or on
    when it entered.
    """

    model: StepModel
    prompts: Sequence[Sequence[int]]
    copies: int
    rows: int
    rules: SamplingRules
    uniforms: Tensor
    waiting: deque[tuple[int, range]] = field(default_factory=deque)  # (prompt, its rollouts), entering together

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (ids (N,T), log-probabilities, mask) of all rollouts in order, T the length of the longest.

        Raises:
            ModelError: a log-probability is not finite.
        """
        total, tokens = self.uniforms.shape
        self.out = Responses.empty(
            total, tokens, self.rules.pad, self.uniforms.device, self.rules.truncation is not None
        )
        for prompt in range(len(self.prompts)):
            rollouts = range(prompt * self.copies, (prompt + 1) * self.copies)
            self.waiting.extend((prompt, rollouts[i : i + self.rows]) for i in range(0, self.copies, self.rows))
        rows, steps = self._enter(None), 0
        while True:
            steps += 1
            if steps % CHECK == 0 or rows.live.device.type == "cpu":
                remaining = self._leave(rows)
                if remaining is None:
                    break
                rows = remaining
            logits = self.model.step(rows.token, rows.position)
            rows = self._choose(replace(rows, position=rows.position + 1), logits)
        ids, logprobs, mask = self.out.finished()
        every_rollout = torch.arange(total, device=mask.device)
        check_logprobs(torch.where(mask, logprobs, 0.0).sum(dim=1), every_rollout)
        return ids, logprobs, mask

    def _choose(self, rows: Rows, logits: Tensor) -> Rows:
        """Sample and record the next token of every row from `logits` (n,V); return the rows after it."""
        last = self.uniforms.shape[1]
        uniforms = self.uniforms[rows.rollout, rows.written.clamp_max(last - 1)]
        allowed, truncation = allowed_(logits, self.rules.banned, self.rules.temperature), self.rules.truncation
        ids, logprobs = draw(allowed if truncation is None else truncation(allowed), uniforms)
        drawn_from = logprobs
        if truncation is not None:  # the model's own, of a token drawn from a part of its distribution
            logprobs = allowed.log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]
        if logits.device.type == "cpu":
            check_logprobs(logprobs.masked_fill(~rows.live, 0.0), rows.rollout)
        index = rows.rollout, torch.where(rows.live, rows.written, last)
        self.out.ids[index], self.out.logprobs[index], self.out.mask[index] = ids, logprobs, rows.live
        if self.out.truncated is not None:
            self.out.truncated[index] = drawn_from
        written = rows.written + 1
        live = rows.live & (written < last)
        if len(self.rules.ends):
            live = live & ~torch.isin(ids, self.rules.ends)
        return replace(rows, written=written, token=torch.where(live, ids, self.rules.pad), live=live)

    def _leave(self, rows: Rows) -> Rows | None:
        """Return the rows to continue with, after finished rows left and others entered; None when all are done."""
        live = int(rows.live.sum())
        ended, room = len(rows.live) - live, self.rows - live
        if live == 0 and not self.waiting:
            return None
        enters = bool(self.waiting) and (live == 0 or (self.model.past.open and self._worth_prefill(room)))
        if ended and (enters or ended * LEAVE >= len(rows.live)):
            live_rows = rows.live.nonzero()[:, 0]
            self.model.past.keep_rows(live_rows)
            rows = rows[live_rows]
        return self._enter(rows) if enters else rows

    def _worth_prefill(self, room: int) -> bool:
        """Whether there is room for waiting rollouts, and for enough of them to prefill their prompts together."""
        return room >= max(len(self.waiting[0][1]), min(self.rows // LEAVE, sum(len(r) for _, r in self.waiting)))

    def _enter(self, rows: Rows | None) -> Rows:
        """Add as many rollouts as there is room for, prefill each prompt once, and sample their first tokens."""
        room = self.rows - (0 if rows is None else len(rows.rollout))
        entering: list[tuple[int, range]] = []
        while self.waiting and len(self.waiting[0][1]) <= room:
            entering.append(self.waiting.popleft())
            room -= len(entering[-1][1])
        device = self.uniforms.device
        ids, mask = left_pad([self.prompts[prompt] for prompt, _ in entering], self.rules.pad, extra_padding(device))
        counts = torch.tensor([len(rollouts) for _, rollouts in entering], device=device)
        source = torch.arange(len(entering), device=device).repeat_interleave(counts)
        rollout = torch.tensor([i for _, rollouts in entering for i in rollouts], device=device)
        mask = mask.to(device)
        logits = self.model.prefill(ids.to(device), mask, source)
        start = torch.zeros_like(rollout)
        new = Rows(rollout, start, start, mask.sum(dim=1)[source] - 1, start == 0)
        new = self._choose(replace(new, position=new.position + 1), logits)
        return new if rows is None or not len(rows.rollout) else rows.concat(new)


def left_pad(rows: Sequence[Sequence[int]], pad: int, more: int = 0) -> tuple[Tensor, Tensor]:
    """Return (ids (B,P) int64, mask (B,P) bool), P the longest row and `more`, pads on the left."""
    width = max(len(row) for row in rows) + more
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width)[None, :] >= width - lengths[:, None]
