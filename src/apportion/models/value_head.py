"""The value model: a head on the policy's trunk or on a copy of it, or a copy of the reward model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apportion.config.sections import LoraConfig, ScoreConfig
from apportion.errors import ConfigError
from apportion.models.families import freeze_other_parts
from apportion.models.loading import use_fastest_attention
from apportion.models.lora import add_adapter
from apportion.models.reward import RewardModel, adjust
from apportion.models.stored_head import head_of


@dataclass(frozen=True)
class ValueStart:
    """How values are initialised.

    Attributes:
        kind: "shared" (a head at zero on the policy's trunk), "separate" (on a copy of that trunk) or "reward" (a copy
            of the reward model: V(s) is at first its score of the text so far, the critic of InstructGPT, Ouyang et
            al. 2022, 2203.02155, appendix C.4).
        reward: the reward model, where kind is "reward".
        scores: how its score is centred and scaled.
    """

    kind: str = "shared"
    reward: RewardModel | None = None
    scores: ScoreConfig = field(default_factory=ScoreConfig)

    @property
    def source(self) -> RewardModel:
        """The reward model. Raises ValueError where it is absent."""
        if self.reward is None:
            raise ValueError("values that start as the reward model's score need the loaded reward model")
        return self.reward


def make_trunk(model: Any, start: ValueStart, lora: LoraConfig, max_length: int) -> Any | None:
    """Return the trunk under the value head, or None for the policy's own.

    Args:
        model: the policy's model before adapters are added, in the dtype in which a fully trained trunk learns.
        max_length: as `load_policy` takes it.

    Raises:
        ConfigError: the reward model does not use the policy's ids, or its score is not linear in its last state.
    """
    if start.kind == "shared":
        return None
    if start.kind == "reward":
        weight = next(model.parameters())
        score_layer(start.source)
        trunk = copy.deepcopy(start.source.model.base_model).to(weight.dtype)
        use_fastest_attention(trunk, weight.device, max_length)
    else:
        trunk = copy.deepcopy(model.base_model)
    if lora.rank > 0:
        return add_adapter(trunk, lora).eval()
    trunk.requires_grad_(True)
    freeze_other_parts(trunk)
    return trunk.eval()


def make_head(model: Any, start: ValueStart) -> nn.Linear:
    """Return the value head d -> 1 in float32: zero, or the reward model's score where values start as that."""
    if start.kind == "reward":
        return score_head(start.source, start.scores)
    output = model.get_output_embeddings().weight
    head = nn.Linear(output.shape[1], 1, device=output.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


@torch.no_grad()
def score_head(reward: RewardModel, scores: ScoreConfig) -> nn.Linear:
    """Return the head whose output on the reward model's last state is its score, centred and scaled.

    The clip of `scores` is left out: no linear layer has one.
    """
    weight, bias = score_layer(reward)
    unclipped = scores.model_copy(update={"clip": None})
    ends = adjust(torch.stack([torch.zeros_like(bias), torch.ones_like(bias)]), reward, unclipped)
    factor, shift = ends[1] - ends[0], ends[0]
    head = nn.Linear(len(weight), 1, device=weight.device)
    head.weight.copy_(weight[None] * factor)
    head.bias.copy_(bias * factor + shift)
    return head


def score_layer(reward: RewardModel) -> tuple[Tensor, Tensor]:
    """Return (weight (d,), bias ()) float32 of R as a function of the last state.

    Raises:
        ConfigError: there is no such function, or the model encodes text instead of the policy's ids.
    """
    fix = "Use ppo.value_model separate or shared."
    if reward.text is not None:
        got = "reward, with a reward model that has its own tokenizer"
        raise ConfigError("ppo.value_model", got, "one that uses the policy's ids", fix)
    if not (reward.reading.decoder and reward.reading.batched):
        got = (
            f"reward, with {type(reward.model).__name__}, whose score depends on more than its last state and the mask"
        )
        raise ConfigError("ppo.value_model", got, "a decoder that reads padded batches", fix)
    layer = head_of(reward.model)
    if not isinstance(layer, nn.Linear):
        got = f"reward, with the head {type(layer).__name__}"
        raise ConfigError("ppo.value_model", got, "a reward model whose head is one linear layer", fix)
    weight = layer.weight.detach().float()
    bias = torch.zeros(len(weight), device=weight.device) if layer.bias is None else layer.bias.detach().float()
    if len(weight) == 1:
        return weight[0], bias[0]
    return weight[reward.positive] - weight[1 - reward.positive], bias[reward.positive] - bias[1 - reward.positive]
