"""The mix of PPO-ptx in the update: texts as ids in a seeded order, and the gradient of their likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apportion.batching import micro_batches, trim
from apportion.config import RLConfig
from apportion.data.answers import DemonstrationReader, builtin_demonstrations
from apportion.data.bad_rows import leaving_out
from apportion.data.tables import usable
from apportion.distributed import collectives
from apportion.errors import DataError
from apportion.generation.given import given_rollouts
from apportion.models.policy import Policy
from apportion.models.text.targets import Limits, Target, TargetEncoder
from apportion.training.optimizer import zero_with_grad

FIELD = "ppo.ptx_data"


class Encoded(NamedTuple):
    """The ids of one text: those that are read first, at least one, the rest, and which of the rest are trained."""

    prompt: list[int]
    completion: list[int]
    trained: list[bool]


class Mix:
    """The texts of a mix and how they enter the update; the order follows from seed, step and place in it alone.

    Attributes:
        rows: the texts. coef: γ, the weight of their loss. batch: texts an optimizer step.
    """

    def __init__(self, rows: Sequence[Encoded], coef: float, batch: int, seed: int) -> None:
        self.rows, self.coef, self.batch, self.seed = list(rows), coef, batch, seed
        self._next = 0
        self._order: tuple[int, list[int]] = (-1, [])

    def begin(self, step: int, updates: int) -> None:
        """Begin batch `step` (from 1), in which there are `updates` optimizer steps."""
        self._next = (step - 1) * updates

    def take(self) -> list[Encoded]:
        """Return the texts of the next optimizer step; each pass over them has a new order."""
        first, self._next = self._next * self.batch, self._next + 1
        return [self.rows[self._place(i)] for i in range(first, first + self.batch)]

    def _place(self, number: int) -> int:
        epoch, place = divmod(number, len(self.rows))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 31 + 17)
            self._order = (epoch, torch.randperm(len(self.rows), generator=generator).tolist())
        return self._order[1][place]

    def backward(self, policy: Policy, micro_batch: int, micro_tokens: int) -> dict[str, Tensor]:
        """Add the gradient of γ times the mean negative log-likelihood a token of the next texts.

        Each of several processes takes its share of them. Returns {"loss/ptx": its part of that mean, nats a token}.
        """
        weights, device = policy.weights, policy.device
        with weights.error_barrier():
            chosen = self.take()
            prompts, completions = [one.prompt for one in chosen], [one.completion for one in chosen]
            masks = [one.trained for one in chosen]  # the rest is attended to, not trained
            texts = given_rollouts(prompts, completions, policy.pad, device, masks=masks)
            tokens = texts.mask.sum()
            mine = collectives.shard(torch.arange(len(texts), device=device))
            parts = micro_batches(texts, mine, micro_batch, micro_tokens) if len(mine) else []
        total = torch.zeros((), device=device)
        for part, counts in weights.pad_micro_batches(parts, torch.zeros(1, dtype=torch.int64, device=device)):
            batch = trim(texts.select(part))
            logprobs = policy.text_logprobs(batch)
            loss = -torch.where(batch.mask, logprobs, 0.0).sum() / tokens if counts else zero_with_grad(logprobs)
            (self.coef * loss).backward()
            total += loss.detach()
        return {"loss/ptx": total}


def open_mix(config: RLConfig, tokenizer: Any, ends: Sequence[int], limits: Limits) -> Mix | None:
    """Return the mix of a run, None where ppo.ptx_coef is 0. Raises DataError for texts that cannot be trained.

    Args:
        tokenizer: the policy's. ends: ids at which it stops, EOS first. limits: of a text's ids.
    """
    ppo = config.ppo
    if ppo.ptx_coef == 0 or ppo.ptx_data is None:
        return None
    encoder = TargetEncoder(FIELD, tokenizer, ends, limits)
    with leaving_out(Path(config.output).expanduser(), config.skip_bad_rows, "ptx_bad_rows.jsonl") as bad:
        reader, builtin = DemonstrationReader(FIELD), builtin_demonstrations(ppo.ptx_data, "data", None)
        if builtin is None:
            made = usable(ppo.ptx_data, lambda row: encoder.encode(reader(row)), field=FIELD, bad=bad)
        else:
            made = map(encoder.encode, builtin)
        targets = list(made)
    rows = [encoded(target) for target in targets if target is not None and len(target.ids) > 1]
    if not rows:
        raise DataError(FIELD, "no text with a token to learn", "at least one", "Give longer texts.")
    return Mix(rows, ppo.ptx_coef, ppo.ptx_batch, config.seed)


def encoded(target: Target) -> Encoded:
    """Return a target as what is read first, at least one id, and the rest, of which some ids are trained."""
    start = max(target.first, 1)
    return Encoded(target.ids[:start], target.ids[start:], target.mask[start:])
