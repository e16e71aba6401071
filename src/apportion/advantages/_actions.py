"""Shared parts of estimators over actions: sums of rewards, successors and discounted returns."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.masking import segment_sum


def last_actions(segments: Tensor) -> Tensor:
    """Return the id of each row's last action, (B,) int64; −1 for a row without tokens."""
    return segments.amax(dim=1) if segments.shape[1] else segments.new_full((len(segments),), -1)


def following(values: Tensor, segments: Tensor) -> Tensor:
    """Return values (B,S) of the next action; 0 after each row's last, and for actions that a row does not have."""
    after = torch.nn.functional.pad(values, (0, 1))[:, 1:]
    real = torch.arange(values.shape[1], device=values.device) < last_actions(segments)[:, None]
    return torch.where(real, after, 0.0)


def action_rewards(rewards: Tensor, segments: Tensor) -> Tensor:
    """Return the sum of the token rewards (B,T) of each action, (B,S) float32."""
    return segment_sum(rewards.float(), segments)


def to_go(rewards: Tensor, gamma: float) -> Tensor:
    """Return G_k = R_k + γ·G_{k+1} of rewards (B,S), counted over actions; beyond a row's last action R is 0."""
    if gamma == 1.0:
        return rewards.flip(1).cumsum(dim=1).flip(1)
    out, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for k in reversed(range(rewards.shape[1])):
        running = rewards[:, k] + gamma * running
        out[:, k] = running
    return out
