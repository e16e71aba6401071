"""The policy and value update under any loss: targets, epochs of mini-batches, one optimizer step a mini-batch."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from apportion.batching import micro_batches, trim
from apportion.config import OptimConfig, PPOConfig
from apportion.distributed import collectives
from apportion.losses import clipped_value
from apportion.masking import is_segment_start, whiten
from apportion.models.policy import Outputs, Policy
from apportion.stages.rl.mix import Mix
from apportion.training.nonfinite import SkippedUpdates
from apportion.training.optimizer import zero_with_grad
from apportion.types import Advantages, PolicyLoss, Rollouts
from apportion.user_code import check_rows


class Targets(NamedTuple):
    """Targets of a batch, all (B,T): advantages, returns, the tokens each loss counts, and action ids."""

    advantages: Tensor
    returns: Tensor
    policy_mask: Tensor
    value_mask: Tensor
    segments: Tensor


def make_targets(estimated: Advantages, segments: Tensor, rollouts: Rollouts, config: PPOConfig) -> Targets:
    """Return the targets: advantages whitened over the batch, values regressed where `config.value_tokens` says.

    With truncated="mask" no loss counts the truncated rows.

    Raises:
        ScoreError: advantages or returns are not finite; it names the rollout.
    """
    check_rows("advantages", estimated.advantages, rollouts.mask)
    check_rows("returns", estimated.returns, rollouts.mask)
    learn = rollouts.mask
    if config.truncated == "mask" and rollouts.ended is not None:
        learn = learn & rollouts.ended[:, None]
    advantages = whiten(estimated.advantages, learn) if config.whiten_advantages else estimated.advantages
    valued = learn if config.value_tokens == "all" else learn & is_segment_start(segments)
    return Targets(advantages, estimated.returns, learn, valued, segments)


class OldOutputs(NamedTuple):
    """Old log-probabilities and entropies (B,T) of the update's own forward, filled before its one optimizer step.

    Where each rollout is used once, before the policy changes, a separate forward would compute the same again.
    """

    old_logprobs: Tensor
    entropy: Tensor

    def record(self, rows: Tensor, batch: Rollouts, out: Outputs) -> Rollouts:
        """Fill in a micro-batch's values and return it with its old log-probabilities."""
        length, logprobs = batch.mask.shape[1], out.logprobs.detach()
        self.old_logprobs[rows, :length] = logprobs
        if out.entropy is not None:
            self.entropy[rows, :length] = out.entropy
        return replace(batch, old_logprobs=logprobs)


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    loss: PolicyLoss,
    rollouts: Rollouts,
    targets: Targets,
    config: PPOConfig,
    optim: OptimConfig,
    generator: torch.Generator,
    old: OldOutputs | None = None,
    skips: SkippedUpdates | None = None,
    mix: Mix | None = None,
) -> dict[str, float]:
    """Run `config.epochs` passes over the batch in fresh random mini-batches and return mean metrics.

    Each loss is divided by the count that it declares, taken over the whole mini-batch, so that micro-batches change
    nothing. Values are learned where the rollouts carry some. Each of several processes has the whole batch, and takes
    its share of every mini-batch; gradients and metrics are summed over them.

    A mini-batch in which no loss counts a token (every response cut off under truncated="mask", or empty) is no step: a
    step would follow the optimizer's momentum alone, and its zeros would dilute the metrics.

    Args:
        old: filled in place with old log-probabilities and entropies, which the rollouts lack; for one optimizer step.
        skips: counts optimizer steps that were not taken, because their loss or gradient is not finite: weights,
            masters, moments and step counters stay as they were. The metrics are means over the steps taken; where
            there is none, they are left out.
        mix: texts whose likelihood every optimizer step raises as well (PPO-ptx, Ouyang et al. 2022, 2203.02155).

    Raises:
        MonitorError: as many steps in a row were skipped as `skips` allows.
    """
    skips = SkippedUpdates() if skips is None else skips
    totals: dict[str, Tensor] = {}
    steps, weights, kept = 0, policy.weights, policy.take_kept()
    for _ in range(config.epochs or 1):
        order = torch.randperm(len(rollouts), generator=generator, device=generator.device).to(rollouts.mask.device)
        for rows in order.split(config.mini_batch):
            # the targets are those of the whole batch, so that all processes decide alike
            learns = bool(targets.policy_mask[rows].any() | targets.value_mask[rows].any())
            if not learns and old is None:
                continue
            with collectives.error_barrier(), weights.relay_errors():
                sums = _backward_mini_batch(policy, loss, rollouts, targets, config, rows, old, kept)
                if mix is not None and learns:
                    sums |= mix.backward(policy, config.micro_batch, config.micro_tokens)
            kept = None
            if not learns:  # its forward has filled in `old`
                optimizer.zero_grad(set_to_none=True)
                continue
            learning = weights.reduce_gradients(policy.trainable())
            norm = weights.gradient_norm(learning)
            if skips.allow(sum_of_losses(sums, norm), norm, rows):
                torch.nn.utils.clip_grads_with_norm_(learning, optim.max_grad_norm, norm)
                optimizer.step()
                sums["policy/grad_norm"] = (
                    norm / collectives.world_size()
                )  # the same in each, and summed over them below
                totals |= {k: totals.get(k, 0) + v.detach() for k, v in sums.items()}
                steps += 1
            optimizer.zero_grad(set_to_none=True)
    return {k: float(v) / steps for k, v in collectives.all_reduce_sum(totals).items()}


def sum_of_losses(sums: dict[str, Tensor], like: Tensor) -> Tensor:
    """Return the sum () of what a mini-batch minimised, which is finite where every part is; 0 without rows."""
    parts = [sums[name].to(like.device) for name in ("loss/policy", "loss/value", "loss/ptx") if name in sums]
    return torch.stack(parts).sum() if parts else torch.zeros_like(like)


def _backward_mini_batch(
    policy: Policy,
    loss: PolicyLoss,
    rollouts: Rollouts,
    targets: Targets,
    config: PPOConfig,
    rows: Tensor,
    old: OldOutputs | None,
    kept: Outputs | None = None,
) -> dict[str, Tensor]:
    """Add the gradient of this process's share of one mini-batch; return its part of the losses and statistics.

    Args:
        kept: outputs of all rollouts in their order, under the present weights; the mini-batch is then all of them.
    """
    weights, critic = policy.weights, "values" in rollouts.evidence
    with weights.error_barrier():
        tokens = targets.policy_mask[rows].sum().clamp_min(1)
        actions = targets.value_mask[rows].sum().clamp_min(1)
        denominator = loss.denominator(targets.policy_mask[rows], targets.segments[rows]).clamp_min(1)
        mine = collectives.shard(rows if kept is None else rows.sort().values)
        parts = micro_batches(rollouts, mine, config.micro_batch, config.micro_tokens) if len(mine) else []
    sums: dict[str, Tensor] = {}
    for part, counts in weights.pad_micro_batches(parts, rows[:1]):
        batch = trim(rollouts.select(part))
        advantages, returns, policy_mask, value_mask, segments = (t[part, : batch.mask.shape[1]] for t in targets)
        shared = critic and policy.value_trunk is None
        out = policy.forward(batch, values=shared, entropy=old is not None) if kept is None else kept
        batch = batch if old is None else old.record(part, batch, out)
        with weights.error_barrier():
            terms = loss.terms(out.logprobs, batch, advantages, policy_mask, segments) if counts else None
        if terms is None:
            _backward_zero(policy, batch, out, critic)
            continue
        policy_loss, statistics = terms
        total, values = policy_loss / denominator, out.values
        statistics = {k: v / tokens for k, v in statistics.items()} | {"loss/policy": total}
        if critic and values is None:  # a separate trunk: the policy's activations are freed first
            total.backward()
            total, values = torch.zeros_like(total), policy.values(batch)[0]
        if values is not None:
            value_loss, value_sums = clipped_value(
                values, batch.evidence["values"], returns, value_mask, clip=config.value_clip
            )
            total = total + config.value_coef * value_loss / actions
            statistics |= {"loss/value": value_loss / actions} | {k: v / actions for k, v in value_sums.items()}
        total.backward()
        sums = {k: sums.get(k, 0) + v.detach() for k, v in statistics.items()}
    return sums


def _backward_zero(policy: Policy, batch: Rollouts, out: Outputs, critic: bool) -> None:
    """Run the backward passes of a micro-batch that does not count, with gradients of 0: other ranks wait for them."""
    total = zero_with_grad(out.logprobs)
    if critic and policy.value_trunk is not None:
        total.backward()
        total = zero_with_grad(policy.values(batch)[0])
    elif out.values is not None:
        total = total + zero_with_grad(out.values)
    total.backward()
