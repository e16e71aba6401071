"""Sources of rollouts, and how processes share a batch: prompts, random numbers, and the gathered whole."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from apportion.compatibility import check_processes
from apportion.config import PPOConfig, RLConfig
from apportion.distributed import collectives, launcher
from apportion.distributed.launch import check_launch
from apportion.evidence.models import SOURCE_ROW
from apportion.generation.prompts import PromptStream
from apportion.generation.sampler import draw_uniforms, sample
from apportion.masking import whiten
from apportion.models.policy import Policy
from apportion.types import Rollouts


class Source(Protocol):
    """Where each process's rollouts come from: its policy, or a queue that other workers fill.

    `group` ids are unique over all processes, and tensors are on the policy's device. Scored rollouts also carry
    evidence "raw_scores" (B,) and everything in `learner.needs` and `learner.base_evidence`. Unscored rollouts are
    taken as on-policy: the current policy computes their old log-probabilities. The checkpoint holds no source's state.
    """

    def take(self, step: int) -> Rollouts:
        """Return this process's rollouts of batch `step` (from 1), with or without scores."""


class PolicySource:
    """Rollouts that the policy itself generates: each process samples all rollouts of its own prompts.

    Args:
        generator: draws the uniforms of the whole batch, alike in all processes.
        scoring_generator: draws while rollouts are scored (vine); with several processes it is this one's.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: PromptStream,
        config: RLConfig,
        generator: torch.Generator,
        scoring_generator: torch.Generator | None,
    ) -> None:
        self.policy, self.prompts, self.config = policy, prompts, config
        self.generator, self.scoring_generator = generator, scoring_generator

    def take(self, step: int) -> Rollouts:
        """Return this process's rollouts of batch `step` (from 1), without scores."""
        sampling = self.config.sampling
        places = self.prompts.places(step, sampling.batch_size // self._copies)
        mine = collectives.shard_slice(len(places))
        uniforms = self._uniforms()
        reseed(self.scoring_generator, self.config.seed, step)
        prompts = [self.prompts.rows[place] for place in places[mine]]
        rollouts = sample(self.policy, prompts, sampling, self.generator, uniforms=uniforms)
        if self.prompts.columns:  # whose row it is: prompts of the same ids may have other columns
            rows = torch.tensor(places[mine], device=rollouts.mask.device)[rollouts.group]
            rollouts = rollouts.with_evidence(**{SOURCE_ROW: rows})
        return replace(rollouts, group=rollouts.group + mine.start)

    @property
    def _copies(self) -> int:
        return self.config.sampling.samples_per_prompt or 1

    def _uniforms(self) -> Tensor:
        """Return this process's random numbers of one batch, (its rollouts, max_new_tokens) float64.

        All processes draw those of the whole batch and take their own: what is sampled does not depend on the number
        of processes, and the generator stays the same in all.
        """
        sampling, copies = self.config.sampling, self._copies
        drawn = draw_uniforms(sampling.batch_size, sampling.max_new_tokens, self.generator)
        mine = collectives.shard_slice(sampling.batch_size // copies)
        return drawn[mine.start * copies : mine.stop * copies]


class FixedSource:
    """Rollouts given in advance, the same for every batch; those with scores are not scored again."""

    def __init__(self, rollouts: Rollouts) -> None:
        self.rollouts = rollouts

    def take(self, step: int) -> Rollouts:
        """Return the rollouts."""
        return self.rollouts


def reseed(generator: torch.Generator | None, seed: int, step: int) -> None:
    """Seed a process's own generator for a step, from the seed, the step and the rank.

    It serves producers that draw while they score (vine), each as much as its rollouts need. In one process it is the
    run's generator, and continues.
    """
    if generator is not None and collectives.world_size() > 1:
        generator.manual_seed(((seed * 1_000_003 + step) * 65_537 + collectives.rank()) % 2**62)


def check_shares(config: RLConfig) -> None:
    """Raise ConfigError where there are fewer prompts or rollouts than processes."""
    check_launch()
    check_processes(config, launcher.launched())


def gather_batch(
    rollouts: Rollouts,
    rewards: Tensor,
    segments: Tensor,
    pad: int,
    config: PPOConfig,
    logged: frozenset[str] = frozenset(),
) -> tuple[Rollouts, Tensor, Tensor]:
    """Return (rollouts, rewards (B,T), segments (B,T)) of all processes; rewards whitened where `config` says.

    `logged` is evidence that a process may lack; no process has it afterwards.
    """
    rollouts = gather_rollouts(without_partial(rollouts, logged), pad)
    rewards, segments = collectives.gather_rows(rewards), collectives.gather_rows(segments, fill=-1)
    if config.whiten_rewards:
        rewards = whiten(rewards, rollouts.mask, keep_mean=True)
    return rollouts, rewards, segments


def without_partial(rollouts: Rollouts, logged: frozenset[str]) -> Rollouts:
    """Return the rollouts without the evidence in `logged` (the same in all processes) that some process lacks."""
    if collectives.world_size() == 1 or not logged:
        return rollouts
    names = sorted(logged)
    present = torch.tensor([float(name in rollouts.evidence) for name in names], device=rollouts.mask.device)
    counts = collectives.all_reduce_tensor(present).tolist()
    lost = {name for name, count in zip(names, counts, strict=True) if count < collectives.world_size()}
    return replace(rollouts, evidence={k: v for k, v in rollouts.evidence.items() if k not in lost})


def gather_rollouts(rollouts: Rollouts, pad: int) -> Rollouts:
    """Return the rollouts of all processes in their order, padded to the longest, evidence included."""
    if collectives.world_size() == 1:
        return rollouts
    changes: dict[str, Any] = {}
    for name in (f.name for f in fields(rollouts)):
        value = getattr(rollouts, name)
        if isinstance(value, Tensor):
            fill = pad if name in ("prompt_ids", "response_ids") else 0
            changes[name] = collectives.gather_rows(value, fill=fill, left=name.startswith("prompt"))
    evidence = {name: collectives.gather_rows(rollouts.evidence[name]) for name in sorted(rollouts.evidence)}
    return replace(rollouts, **changes, evidence=evidence)
