"""Where the batches of a run come from, and how processes share them: prompts, random numbers, the whole batch."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from apportion.compatibility import check_processes
from apportion.config import RLConfig
from apportion.distributed import collectives
from apportion.distributed.launch import check_launch
from apportion.generation.sampler import draw_uniforms
from apportion.types import Rollouts


def check_shares(config: RLConfig) -> None:
    """Raise ConfigError where there are too few prompts or rollouts for the launched processes."""
    check_launch()
    check_processes(config, collectives.launched())


def uniforms(config: RLConfig, generator: torch.Generator) -> Tensor:
    """Return this process's random numbers of one batch, (its rollouts, max_new_tokens) float64.

    All processes draw those of the whole batch from the same generator and take their own, so that what is sampled
    does not depend on the number of processes, and the generator stays the same in all.
    """
    sampling = config.sampling
    copies = sampling.samples_per_prompt or 1
    drawn = draw_uniforms(sampling.batch_size, sampling.max_new_tokens, generator)
    mine = collectives.shard_slice(sampling.batch_size // copies)
    return drawn[mine.start * copies : mine.stop * copies]


def reseed(generator: torch.Generator | None, seed: int, step: int) -> None:
    """Start a process's own generator anew for a step, from the seed, the step and the process's number.

    It serves producers that draw while they score (vine), as much as their rollouts ask for. In one process it is the
    run's generator, and goes on as it is.
    """
    if generator is not None and collectives.world_size() > 1:
        generator.manual_seed(((seed * 1_000_003 + step) * 65_537 + collectives.rank()) % 2**62)


def whole_batch(rollouts: Rollouts, pad: int) -> Rollouts:
    """Return the rollouts of all processes in their order, padded to the longest, evidence included.

    So whitening, group statistics, controllers, metrics and denominators are those of one process, whatever method
    computes them.
    """
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
