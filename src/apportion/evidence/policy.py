"""One forward of the policy, and one of the reference: log-probabilities, values, entropy, attention."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from apportion.batching import without_holes
from apportion.masking import last_index
from apportion.models.attention.row import AttentionTap, attention_row
from apportion.models.policy import Outputs, Policy
from apportion.types import Rollouts

STEPS_AT_ONCE = 64  # attention rows in memory at a time
POLICY = frozenset(
    {"old_logprobs", "values", "bootstrap_values", "entropy", "policy_attention_mean", "policy_attention_last"}
)


def policy_evidence(policy: Policy, rollouts: Rollouts, needs: frozenset[str]) -> dict[str, Tensor]:
    """Return the needed ones of old_logprobs, values, entropy, policy_attention_* (B,T) and bootstrap_values (B,).

    Where `policy.keeps_forward`, its graph is kept for the update.
    """
    tapped = any(name.startswith("policy_attention") for name in needs)
    unshared = policy.without_shared_prompts() if tapped else contextlib.nullcontext()
    valued, apart = bool(needs & {"values", "bootstrap_values"}), policy.value_trunk is not None
    with torch.no_grad(), unshared, attention_row(policy.model) if tapped else contextlib.nullcontext() as tap:
        with torch.set_grad_enabled(policy.keeps_forward and "old_logprobs" in needs):
            out = policy.forward(rollouts, values=valued and not apart, entropy=True)
        if "old_logprobs" in needs:  # else it is asked again for what failed, and a forward for that lacks the rest
            policy.kept = out if policy.keeps_forward else None
        values, after = policy.values(rollouts) if valued and apart else (out.values, out.after)
        return {name: value.detach() for name, value in _needed(tap, rollouts, needs, out, values, after).items()}


def _needed(
    tap: AttentionTap | None,
    rollouts: Rollouts,
    needs: frozenset[str],
    out: Outputs,
    values: Tensor | None,
    after: Tensor | None,
) -> dict[str, Tensor]:
    """Return the needed evidence of one forward."""
    evidence: dict[str, Tensor | None] = {
        "old_logprobs": out.logprobs,
        "values": values,
        "bootstrap_values": after,
        "entropy": out.entropy,
    }
    if tap is not None and "policy_attention_mean" in needs:
        evidence["policy_attention_mean"] = mean_attention(tap, rollouts)
    if tap is not None and "policy_attention_last" in needs:
        final = last_index(rollouts.mask).clamp_min(0)[:, None]
        evidence["policy_attention_last"] = step_attention(tap, rollouts, final)[:, 0]
    return {name: evidence[name] for name in needs if evidence.get(name) is not None}  # type: ignore[misc]


def step_attention(tap: AttentionTap, rollouts: Rollouts, steps: Tensor) -> Tensor:
    """Return the head-mean attention over response tokens (B,R,T) at generation steps (B,R).

    The step that generates response token t attends from the position before it, so columns from t on are 0. The
    forward's columns are those of the rollouts `without_holes`.
    """
    prompt, (_, places) = rollouts.prompt_ids.shape[1], without_holes(rollouts)
    before = steps if places is None else places.gather(1, steps)
    rows = tap.weights(prompt + before - 1).mean(dim=2)[..., prompt:]
    if places is not None:
        rows = rows.gather(2, places[:, None, :-1].expand_as(rows).clamp_max(rows.shape[2] - 1))
    return torch.where(rollouts.mask[:, None, :], rows, 0.0)


def mean_attention(tap: AttentionTap, rollouts: Rollouts) -> Tensor:
    """Return the attention over response tokens averaged over the generation steps, (B,T), a few steps at a time."""
    rows, length = rollouts.mask.shape
    total = torch.zeros(rows, length, device=rollouts.mask.device)
    for steps in torch.arange(length, device=total.device).split(STEPS_AT_ONCE):
        attention = step_attention(tap, rollouts, steps.expand(rows, -1))
        total += (attention * rollouts.mask[:, steps, None]).sum(dim=1)
    return total / rollouts.mask.sum(dim=1, keepdim=True).clamp_min(1)


def reference_evidence(policy: Policy, rollouts: Rollouts) -> dict[str, Tensor]:
    """Return {"reference_logprobs": (B,T)} of the sampled tokens, nats."""
    return {"reference_logprobs": policy.reference_logprobs(rollouts)}
