"""The best policy of a run by its reward on held-out prompts, kept beside the final one with its step and figure."""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import dataclass, replace
from typing import Any

import torch

from apportion.config import RLConfig
from apportion.distributed import collectives, sharding
from apportion.errors import ConfigError
from apportion.evidence import Models
from apportion.evidence.models import SOURCE_ROW
from apportion.evidence.vine import scores_of
from apportion.generation import sample
from apportion.generation.prompts import PromptStream, encode_prompts, load_prompts
from apportion.intervals import mean_interval
from apportion.models.loading import context_of, locate
from apportion.models.master_weights import to_float32
from apportion.models.policy import Policy
from apportion.models.saving import save_policy
from apportion.system import disk
from apportion.training.run_folder import RunFolder

FIELD, FOLDER = "keep_best.prompts", "best"
SEED = 7_919  # added to the run's: the held-out prompts are sampled with numbers of their own


@dataclass
class Best:
    """The held-out prompts, and the best step so far; step 0 before any.

    Attributes:
        models: the run's, with the held-out prompts' columns. prompts: those. every: steps between two trials.
    """

    models: Models
    prompts: PromptStream
    config: RLConfig
    step: int = 0
    reward: float = -math.inf

    def is_due(self, step: int) -> bool:
        """Whether the policy is tried after `step`: every so often, and after the last one."""
        return step % self.config.keep_best.every == 0 or step == self.config.steps

    def rewards(self) -> list[float]:
        """Return the reward of one response to each held-out prompt, in their order, from the same random numbers.

        It is the weighted sum of the run's rewards, none of them normalised. Every process samples its share.
        """
        with collectives.error_barrier():
            own = self._own_rewards()
        everywhere: list[Any] = [own]
        if collectives.world_size() > 1:
            everywhere = [None] * collectives.world_size()
            torch.distributed.all_gather_object(everywhere, own)
        return [reward for _, reward in sorted(pair for part in everywhere for pair in part)]

    def _own_rewards(self) -> list[tuple[int, float]]:
        """Return (place, reward) of this process's share of the held-out prompts: every so many batches of them."""
        sampling = self.config.sampling.model_copy(update={"samples_per_prompt": 1})
        policy, rows, size = self.models.policy, self.prompts.rows, self.config.sampling.batch_size
        found: list[tuple[int, float]] = []
        for number, first in enumerate(range(0, len(rows), size)):
            if number % collectives.world_size() != collectives.rank():
                continue
            generator = torch.Generator(device=policy.device).manual_seed(self.config.seed + SEED + number)
            rollouts = sample(policy, rows[first : first + size], sampling, generator)
            if self.prompts.columns:
                rollouts = rollouts.with_evidence(**{SOURCE_ROW: rollouts.group + first})
            found += zip(range(first, first + size), scores_of(self.models, rollouts).tolist(), strict=False)
        return found

    def keep(self, run: RunFolder, step: int, settings: dict[str, Any]) -> dict[str, float]:
        """Try the policy after `step`, save it to best/ where no step before was better, and return the metrics."""
        with torch.no_grad():
            rewards = self.rewards()
        figure = mean_interval(rewards)
        mean = float(figure["mean"])
        if mean > self.reward:
            self.step, self.reward = step, mean
            with collectives.error_barrier():
                if collectives.is_main():
                    self._save(run, settings, {"step": step, "reward": figure, "prompts": len(rewards)})
        return {"held_out/reward": mean, "held_out/best_reward": self.reward, "held_out/best_step": float(self.step)}

    def _save(self, run: RunFolder, settings: dict[str, Any], figures: dict[str, Any]) -> None:
        policy, part = self.models.policy, run.path / f"{FOLDER}.tmp"
        base = locate("policy", self.config.policy)

        def work() -> None:
            shutil.rmtree(part, ignore_errors=True)
            save_policy(detached(policy), base, part, settings)
            (part / "best.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")

        run.retry_when_full(work, 4 * sum(p.numel() for p in policy.model.parameters()))
        run.retry_when_full(lambda: disk.replace_durably(part, run.path / FOLDER), 1 << 12)
        run.update_status(best={"step": figures["step"], "reward": figures["reward"]["mean"]})

    def state(self) -> torch.Tensor:
        """Return the best step and its reward, for a checkpoint."""
        return torch.tensor([float(self.step), self.reward], dtype=torch.float64)

    def load_state(self, state: torch.Tensor) -> None:
        """Restore `state`."""
        self.step, self.reward = int(state[0]), float(state[1])


def detached(policy: Policy) -> Policy:
    """Return a policy that can be saved while `policy` trains on: weights in 16 bit with masters are copied."""
    if not policy.remainders:
        return policy
    made = copy.copy(policy)
    made.model = copy.deepcopy(policy.model)
    pairs = zip(policy.model.parameters(), made.model.parameters(), strict=True)
    made.remainders = {new: policy.remainders[old].clone() for old, new in pairs if old in policy.remainders}
    to_float32(dict(made.remainders))
    made.remainders = {}
    return made


def open_best(config: RLConfig, models: Models) -> Best | None:
    """Return the held-out prompts of a run, None where keep_best.every is 0.

    Raises:
        ConfigError: no held-out prompts are given, or the weights are sharded. DataError: as `encode_prompts`.
    """
    chosen = config.keep_best
    if not chosen.every:
        return None
    if sharding.is_requested():
        fix = "Set it to 0, or train without sharded weights."
        raise ConfigError(
            "keep_best.every", chosen.every, "0 with sharded weights, which are whole at the end only", fix
        )
    source = chosen.prompts or config.prompts
    rewards = models.rewards
    wanted = frozenset[str]() if rewards is None else rewards.wanted
    loaded = load_prompts(source, "evaluate_validation", None, wanted, chosen.split)
    if rewards is not None:
        rewards.check_columns([prompt.columns for prompt in loaded])
    folder = locate("policy", config.policy)
    context, tokenizer = context_of(folder), models.policy.tokenizer
    prompts = encode_prompts(loaded, tokenizer, config.sampling, config.seed, context, None, chosen.count)
    turns = {**models.conversations, **prompts.conversations}
    return Best(replace(models, columns=prompts.columns, conversations=turns), prompts, config)
