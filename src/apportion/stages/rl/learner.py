"""The learner of a reinforcement-learning run: models, optimizer, controllers and random state, all checkpointed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion import credit
from apportion.batching import micro_batches, trim
from apportion.config import RLConfig, reward_specs
from apportion.credit.process import DENSE, with_dense
from apportion.distributed import collectives, sharding
from apportion.evidence import Models
from apportion.evidence.policy import POLICY
from apportion.evidence.scoring import BASE_EVIDENCE, score
from apportion.generation.prompts import PromptStream
from apportion.losses._ratios import LIMIT
from apportion.models.loading import context_of, locate
from apportion.models.text.targets import TRUNCATE, Limits
from apportion.models.tokenizers import load_tokenizer, policy_ends
from apportion.registry import EvidenceKey
from apportion.stages.doctor.findings import Finding
from apportion.stages.method import comparisons
from apportion.stages.rl.best import open_best
from apportion.stages.rl.compared import Compared, available
from apportion.stages.rl.mix import Mix, open_mix
from apportion.stages.rl.models import open_models
from apportion.stages.rl.sources import PolicySource, Source
from apportion.stages.rl.update import OldOutputs, Targets, update
from apportion.system.disk import require_space
from apportion.training import rng
from apportion.training.crash_dump import CrashDump
from apportion.training.monitoring import Monitoring
from apportion.training.optimizer import learning_rate, make_optimizer
from apportion.training.run_folder import RunFolder
from apportion.training.state import Tensors, pack_state, unpack_state
from apportion.types import Credit, Method, Rollouts, State
from apportion.user_code import UserCode, guard_credit, guard_method, means, user_defined_names


class Learner:
    """Models, optimizer, controllers and random state of one run.

    Attributes:
        models: policy and reward model. policy: the first of them. method: credit, segmenter, estimator and loss.
        source: where rollouts come from. needed: the evidence that the method needs, and every run.
        generator: the run's only randomness after loading. compare: credits whose rewards are logged as well.
        single_step: one optimizer step a batch, so the update's forward supplies the old log-probabilities.
        mix: texts that the update learns as well (PPO-ptx). best: the best policy so far on held-out prompts.
        monitoring: monitors and skipped updates. crash_dump: saves the batch of a failed step.
    """

    def __init__(
        self,
        config: RLConfig,
        models: Models,
        method: Method,
        prompts: PromptStream,
        generator: torch.Generator,
        compare: Mapping[str, Credit],
        run: RunFolder | None = None,
        warn: Callable[[str], None] = lambda line: None,
        mix: Mix | None = None,
    ) -> None:
        self.config, self.models, self.policy, self.method = config, models, models.policy, method
        self.prompts, self.generator, self.mix = prompts, generator, mix
        self.best = open_best(config, models)
        self.source: Source = PolicySource(models.policy, prompts, config, generator, models.generator)
        self.needed = method.needs - {DENSE} | {"reference_logprobs"}  # dense rewards come with the scores
        self.needed |= {"bootstrap_values"} if config.ppo.truncated == "bootstrap" else set()
        self.compare = Compared(compare, self.needed | BASE_EVIDENCE, warn)
        self.single_step = single_step_on_policy(config, self.needs)
        self.optimizer = make_optimizer(self.policy.trainable(), self.policy.remainders, config.optim)
        self.credit_state: State = method.credit.init()
        self.monitoring = Monitoring(config.monitors, run)
        functions = [spec.source for spec in reward_specs(config.reward_model, config.rewards)]
        names = user_defined_names({**method.specs, "compare": list(compare), "needs": [*self.needs, *functions]})
        modules = {name.split(":")[0]: name for name in names}
        columns = {"credit": self.rewards_before_kl, "ratio": self.ratios}
        tokenizer, nonfinite = self.policy.tokenizer, self.monitoring.nonfinite
        self.crash_dump: CrashDump | None = CrashDump(run, tokenizer, models.user_code, modules, nonfinite, columns)

    @property
    def needs(self) -> frozenset[str]:
        """All evidence to produce beside `base_evidence`."""
        return self.needed | self.compare.needs

    @property
    def base_evidence(self) -> frozenset[str]:
        """The evidence that every run produces."""
        return BASE_EVIDENCE - POLICY if self.single_step else BASE_EVIDENCE

    @property
    def pad_token_id(self) -> int:
        """The id that fills masked places."""
        return self.policy.pad

    def set_up_sharding(self, abort: Callable[[str], None]) -> None:
        """Shard the weights where the launcher asks for it (`training.state.Learner`)."""
        if sharding.is_requested():
            collectives.broadcast(self.policy.trainable())
            self.policy.shard(sharding.reshard_after_forward(), abort)
            self.optimizer = make_optimizer(self.policy.learning(), self.policy.remainders, self.config.optim)

    def broadcast_weights(self) -> None:
        """Broadcast the main process's weights that every process holds whole."""
        collectives.broadcast(self.policy.weights.replicated(self.policy.trainable()))

    def gather_weights(self) -> None:
        """Gather sharded weights in the main process, to be saved."""
        self.policy.make_whole()

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights."""
        return self.policy.weights.sharded

    def state_dict(self) -> Tensors:
        """Return everything that the next batch depends on, for a checkpoint."""
        # `models.generator` is the same one, or seeded for each step (`sources.reseed`)
        best = {} if self.best is None else {"keep_best": self.best.state()}
        packed = self.policy.weights.gather_state(pack_state(self.policy.learning(), self.optimizer))
        return packed | {
            "state": self.credit_state | {"generator": self.generator.get_state()} | best,
            "monitors": self.monitoring.state,
        }

    def load_state_dict(self, stored: Tensors) -> None:
        """Restore what `state_dict` returned. Raises ConfigError where it is another model's."""
        policy = self.policy
        unpack_state(policy.weights.shard_state(stored), policy.learning(), self.optimizer, policy.remainders)
        state = dict(stored["state"])
        self.generator.set_state(state.pop("generator"))
        best = state.pop("keep_best", None)
        if self.best is not None and best is not None:
            self.best.load_state(best)
        self.credit_state = state
        self.monitoring.load_state(stored["monitors"])

    def models_by_name(self) -> dict[str, Any]:
        """Return the models whose kernels and devices the run's numbers depend on."""
        reward = self.models.reward
        models = {"policy": self.policy.model, "value": self.policy.value_trunk}
        models |= {"reward": None if reward is None else reward.model}
        return {name: model for name, model in models.items() if model is not None}

    def score(self, rollouts: Rollouts) -> Rollouts:
        """Return the rollouts with scores and all evidence; what only the log needs may be absent (`compared`)."""
        scores, compare = self.config.scores, self.compare
        self.policy.keeps_forward = not self.single_step and starts_update(self.config, rollouts, self.needs)
        return score(self.models, rollouts, self.needs, scores, self.base_evidence, compare.logged, compare.fail)

    def standardise_rewards(self, rollouts: Rollouts) -> Rollouts:
        """Return scored rollouts with those rewards standardised over all processes that settings ask it for."""
        rewards = self.models.rewards
        return rollouts if rewards is None else rewards.standardise(self.models, rollouts)

    def add_credit_share(self, rollouts: Rollouts) -> Rollouts:
        """Return the rollouts with evidence "credit_share" (B,T) where the estimator needs it and the credit has it."""
        share = self.method.credit.share
        if "credit_share" not in self.method.estimate.needs or share is None:
            return rollouts
        return rollouts.with_evidence(credit_share=share(rollouts))

    def update(self, rollouts: Rollouts, targets: Targets, step: int) -> tuple[dict[str, float], Rollouts]:
        """Run the update of batch `step` at its learning rate; return (mean metrics, the rollouts).

        Where each rollout is used once, the rollouts returned carry the old log-probabilities and entropies of the
        update's own forward.
        """
        config, nonfinite = self.config, self.monitoring.nonfinite
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step - 1, config.steps)
        empty = torch.zeros((2, *rollouts.mask.shape), device=self.policy.device)
        old = OldOutputs(*empty) if self.single_step else None
        nonfinite.begin()
        if self.mix is not None:
            updates = (config.ppo.epochs or 1) * -(-config.sampling.batch_size // config.ppo.mini_batch)
            self.mix.begin(step, updates)
        metrics = update(
            self.policy,
            self.optimizer,
            self.method.loss,
            rollouts,
            targets,
            config.ppo,
            config.optim,
            self.generator,
            old,
            nonfinite,
            self.mix,
        )
        if old is not None:
            rollouts = replace(rollouts, old_logprobs=old.old_logprobs).with_evidence(entropy=old.entropy)
        return metrics, rollouts

    def update_controllers(self, rollouts: Rollouts, rewards: Tensor) -> dict[str, float]:
        """Update the credit's state once for the batch and return its statistics as means."""
        method = self.method.credit
        if method.stats is None:
            return {}
        sums = method.stats(rollouts, rewards, rewards)
        metrics = means(self.method.specs, "credit", sums)
        if method.update is not None:
            self.credit_state = method.update(self.credit_state, sums)
        coefficients = self.kl_coefficients()
        return metrics | ({"kl/coef": float(sum(coefficients))} if coefficients else {})

    def rewards_before_kl(self, rollouts: Rollouts) -> Tensor:
        """Return the rewards (B,T) of the credit chain without its KL penalty."""
        rewards, _ = credit.apply(self.method.credit, rollouts, self.credit_state)
        if self.method.credit.keeps_return:
            return rewards
        kl = torch.where(rollouts.mask, rollouts.logprobs - rollouts.evidence["reference_logprobs"], 0.0)
        return rewards + sum(self.kl_coefficients()) * kl

    def kl_coefficients(self) -> list[Tensor]:
        """Return κ of every KL penalty in the chain (one at most: `compatibility` refuses two)."""
        return [self.credit_state[key] for key in self._kl_keys()]

    def raise_kl_coef(self, factor: float, limit: float) -> bool:
        """Multiply κ by `factor`, to at most `limit` times its start; return whether it rose."""
        rose = False
        for key in self._kl_keys():
            now, start = self.credit_state[key], self.method.credit.init()[key]
            risen = torch.maximum(now, torch.minimum(now * factor, start.to(now) * limit))
            self.credit_state = self.credit_state | {key: risen}
            rose = rose or bool(risen > now)
        return rose

    def _kl_keys(self) -> list[str]:
        chain = enumerate(self.method.specs["credit"])  # `chain` puts the position before a state's key
        return [f"{i}.coef" for i, spec in chain if "kl_penalty" in spec]

    @torch.no_grad()
    def ratios(self, rollouts: Rollouts) -> Tensor:
        """Return π/π_old (B,T) under the current policy, log-ratios cut to ±20; 1 off the mask. For crash dumps.

        Raises:
            RuntimeError: the weights are sharded, and one process cannot run them.
        """
        if self.policy.weights.sharded:
            raise RuntimeError("sharded weights")
        out = torch.ones(rollouts.mask.shape, device=rollouts.mask.device)
        everyone = torch.arange(len(rollouts), device=rollouts.mask.device)
        for part in micro_batches(rollouts, everyone, self.config.ppo.micro_batch, self.config.ppo.micro_tokens):
            batch = trim(rollouts.select(part))
            now = self.policy.forward(batch, values=False, entropy=False).logprobs.float()
            gap = torch.where(batch.mask, now - batch.old_logprobs.float(), 0.0)
            out[part, : batch.mask.shape[1]] = gap.clamp(-LIMIT, LIMIT).exp()
        return out


def make_learner(
    config: RLConfig,
    method: Method,
    run: RunFolder | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> Learner:
    """Return everything that a run holds: models, prompts, optimizer, states. Cheap checks come before models."""
    rng.seed(config.seed)
    require_space(Path(config.output).expanduser(), 200_000_000)
    user_code = UserCode(config.monitors.timeout)
    method = guard_method(method, user_code)
    lines: list[str] = []
    compared = comparisons(config.compare, lines.append) if config.log_rollouts else {}
    compare = {name: guard_credit(name, one, user_code) for name, one in compared.items()}
    logged = frozenset[str]().union(*(one.needs for one in compare.values()))
    mix = read_mix_of(config)
    models, prompts, findings = open_models(config, method, logged, user_code)
    if models.rewards is not None and models.rewards.may_be_dense:
        method = method._replace(credit=with_dense(method.credit))
    generator = torch.Generator(device=models.policy.device).manual_seed(config.seed)
    # vine draws a different number of random values in each process: with several, each has its own generator for it
    alone = collectives.world_size() == 1
    models.generator = generator if alone else torch.Generator(device=models.policy.device)
    record_warnings(findings, run, warn)  # after loading, so that a model error is reported first
    for line in lines:
        warn(line)
    compare = available(models, compare, warn)
    return Learner(config, models, method, prompts, generator, compare, run, warn, mix)


def read_mix_of(config: RLConfig) -> Mix | None:
    """Return the run's mix of texts, before any weights are loaded; None without one."""
    if config.ppo.ptx_coef == 0:
        return None
    folder = locate("policy", config.policy)
    tokenizer = load_tokenizer("policy", folder, config.pad_token)
    length = min(config.ppo.ptx_tokens, context_of(folder))
    limits = Limits(length, TRUNCATE, setting="ppo.ptx_tokens", ways="--skip_bad_rows")
    return open_mix(config, tokenizer, policy_ends(folder, tokenizer, "eos"), limits)


def record_warnings(findings: Sequence[Finding], run: RunFolder | None, warn: Callable[[str], None]) -> None:
    """Write the warnings of the preflight checks into status.json and pass them to `warn`."""
    if findings and run is not None:
        run.update_status(doctor=[{"name": one.name, "message": one.message, "fix": one.fix} for one in findings])
    for one in findings:
        warn(f"warning: {one.name}: {one.message}. {one.fix}".rstrip())


def starts_update(config: RLConfig, rollouts: Rollouts, needs: frozenset[str]) -> bool:
    """Whether the policy's forward for scoring is the first one of the update as well, and its graph can be kept.

    So it is where one mini-batch, of one micro-batch, is the whole batch: the weights have not changed in between.
    """
    ppo, scores = config.ppo, config.scores
    rows, tokens = min(ppo.micro_batch, scores.micro_batch), min(ppo.micro_tokens, scores.micro_tokens)
    everyone = torch.arange(len(rollouts), device=rollouts.mask.device)
    whole = ppo.mini_batch >= len(rollouts) > 0 and len(micro_batches(rollouts, everyone, rows, tokens)) == 1
    # a forward whose attention is captured shares no prompts, which would make the update's slower
    tapped = any(need.startswith("policy_attention") for need in needs)
    shares = tapped and len(rollouts.group.unique()) < len(rollouts)
    return whole and collectives.world_size() == 1 and not shares


def single_step_on_policy(config: RLConfig, needs: frozenset[str]) -> bool:
    """Whether one optimizer step uses the whole batch and nothing else needs the policy's outputs before it.

    The update's own forward then gives the old log-probabilities: one policy forward a batch is avoided.
    """
    one_step = (config.ppo.epochs or 1) == 1 and config.ppo.mini_batch >= config.sampling.batch_size
    return one_step and collectives.world_size() == 1 and not {EvidenceKey.of(need).name for need in needs} & POLICY
