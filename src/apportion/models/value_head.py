"""Initial value models: a zero head on the policy's trunk or on a copy of it, or the reward model itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from apportion.config import RLConfig
from apportion.errors import ConfigError
from apportion.models.loading import use_fastest_attention
from apportion.models.lora import add_adapter
from apportion.models.reward import RewardModel, adjust

HEADS = ("score", "classifier")


def make_trunk(model: Any, config: RLConfig, reward: RewardModel | None) -> Any | None:
    """Return the trunk under the value head, or None for the policy's own.

    With `ppo.value_model` "reward" V(s) is initially the reward model's score of the text so far, centred and scaled
    by `scores`: the critic of InstructGPT (Ouyang et al. 2022, 2203.02155, appendix C.4).

    Args:
        model: the policy's model before adapters are added, in the dtype in which a fully trained trunk learns.

    Raises:
        ConfigError: the reward model does not use the policy's ids, or its score is not linear in its last state.
    """
    kind, weight = config.ppo.value_model, next(model.parameters())
    if kind == "shared":
        return None
    if kind == "reward":
        score_layer(required(reward))
        trunk = copy.deepcopy(required(reward).model.base_model).to(weight.dtype)
        pair = config.sampling.prompt_tokens or [0, config.sampling.max_prompt_tokens]
        use_fastest_attention(trunk, weight.device, pair[1] + config.sampling.max_new_tokens)
    else:
        trunk = copy.deepcopy(model.base_model)
    return (add_adapter(trunk, config.lora) if config.lora.rank > 0 else trunk.requires_grad_(True)).eval()


def make_head(model: Any, config: RLConfig, reward: RewardModel | None) -> nn.Linear:
    """Return the value head d -> 1 in float32: zero, or that of the reward model's score."""
    if config.ppo.value_model == "reward":
        return score_head(required(reward), config)
    output = model.get_output_embeddings().weight
    head = nn.Linear(output.shape[1], 1, device=output.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def required(reward: RewardModel | None) -> RewardModel:
    """Return the reward model. Raises ValueError where the caller did not pass one."""
    if reward is None:
        raise ValueError("ppo.value_model 'reward' needs the loaded reward model")
    return reward


@torch.no_grad()
def score_head(reward: RewardModel, config: RLConfig) -> nn.Linear:
    """Return the head whose output on the reward model's last state is its score, centred and scaled."""
    weight, bias = score_layer(reward)
    ends = adjust(torch.stack([torch.zeros_like(bias), torch.ones_like(bias)]), reward, unclipped(config))
    factor, shift = ends[1] - ends[0], ends[0]
    head = nn.Linear(len(weight), 1, device=weight.device)
    head.weight.copy_(weight[None] * factor)
    head.bias.copy_(bias * factor + shift)
    return head


def score_layer(reward: RewardModel) -> tuple[Tensor, Tensor]:
    """Return (weight (d,), bias ()) float32 of R as a function of the last state.

    Raises:
        ConfigError: there is no such function, or the model scores text instead of the policy's ids.
    """
    fix = "Use ppo.value_model separate or shared."
    if reward.text is not None:
        got = "reward, with a reward model that has its own tokenizer"
        raise ConfigError("ppo.value_model", got, "one that uses the policy's ids", fix)
    layer = next((m for name, m in reward.model.named_children() if name in HEADS), None)
    if not isinstance(layer, nn.Linear):
        got = f"reward, with the head {type(layer).__name__}"
        raise ConfigError("ppo.value_model", got, "a reward model whose head is one linear layer", fix)
    weight = layer.weight.detach().float()
    bias = torch.zeros(len(weight), device=weight.device) if layer.bias is None else layer.bias.detach().float()
    if len(weight) == 1:
        return weight[0], bias[0]
    return weight[reward.positive] - weight[1 - reward.positive], bias[reward.positive] - bias[1 - reward.positive]


def unclipped(config: RLConfig) -> Any:
    """Return the settings of scores without their clip, which a linear layer cannot apply."""
    scores = copy.copy(config.scores)
    scores.clip = None
    return scores
