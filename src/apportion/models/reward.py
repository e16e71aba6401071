"""Reward models: one score a sequence, the scored position, and the attention of that position."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.config.sections import ScoreConfig
from apportion.credit import AttentionSpec
from apportion.errors import ConfigError, ModelError, ScoreError
from apportion.masking import check_finite
from apportion.models.attention.row import attention_row, needed_layers
from apportion.models.loading import load_classifier, locate, pick_device, pick_dtype
from apportion.models.shared_prompt import Shared, prefill_prompts, response_inputs
from apportion.models.text.render import check_model, check_tokenizer
from apportion.models.text.token_spans import PolicyText
from apportion.models.tokenizers import read_tokenizer, with_pad
from apportion.types import Rollouts

STATISTICS = "reward.json"  # beside the weights: mean and sd of R on held-out text


@dataclass
class RewardModel:
    """A sequence classifier with 1 or 2 labels as R = logit, or logit(positive) − logit(negative).

    Attributes:
        model: the classifier; tokenizer: its own.
        positive: index of the positive label when there are two.
        mean, sd: of R on the held-out set it was evaluated on; None when they are not stored beside the weights.
        text: decodes the policy's ids for a model with its own tokenizer; None where the model uses the policy's ids.
    """

    model: Any
    tokenizer: Any
    positive: int = 1
    mean: float | None = None
    sd: float | None = None
    text: PolicyText | None = None

    def score(self, ids: Tensor, mask: Tensor, *, attention: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return (scores (B,), attention row (B,K) or None, positions (B,)) of padded sequences, in one forward.

        Args:
            ids: (B,K) int64; mask: (B,K) bool, padded on either side (encoders: right).
            attention: also return the last layer's row at the scored position, averaged over heads.

        Raises:
            ScoreError: a score is not finite; it names the row.
            ModelError: the model's attention cannot be captured.
        """
        scores, rows, positions = self.forward(ids, mask, [AttentionSpec()] if attention else [])
        return scores, rows[0] if attention else None, positions

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor, specs: Sequence[AttentionSpec]) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return (scores (B,), an attention row (B,K) for each of `specs`, positions (B,)), in one forward.

        The rows are those of the scored position. Otherwise as `score`.
        """
        pad = self.model.config.get_text_config().pad_token_id
        ids = ids.masked_fill(~mask, pad)
        inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask.long()}
        if is_decoder(self.model):
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
        positions = self.positions(ids)
        if not specs:
            return self.scores_of(self.model(**inputs).logits), [], positions
        with attention_row(self.model, needed_layers(specs)) as tap:
            logits = self.model(**inputs).logits
        scores = self.scores_of(logits)
        return scores, [tap.attention(spec, positions) for spec in specs], positions

    @torch.no_grad()
    def forward_shared(
        self, rollouts: Rollouts, shared: Shared, specs: Sequence[AttentionSpec]
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return the result of `forward` for `rollouts` in this model's ids, each distinct prompt computed once."""
        pad = self.model.config.get_text_config().pad_token_id

        def run(keep: int, **inputs: Any) -> Tensor:
            states: Tensor = self.model.base_model(**inputs).last_hidden_state
            return states[:, -keep:]

        _, past = prefill_prompts(run, rollouts, shared)
        inputs = response_inputs(rollouts, past)
        inputs["input_ids"] = rollouts.response_ids.masked_fill(~rollouts.valid, pad)
        positions = self.positions(inputs["input_ids"])  # in the response, which is the model's only input here
        width = rollouts.prompt_ids.shape[1]
        if not specs:
            return self.scores_of(self.model(**inputs).logits), [], width + positions
        with attention_row(self.model, needed_layers(specs)) as tap:
            logits = self.model(**inputs).logits
        return self.scores_of(logits), [tap.attention(spec, positions) for spec in specs], width + positions

    def scores_of(self, logits: Tensor) -> Tensor:
        """Return R (B,) float32 from logits (B, 1 or 2). Raises ScoreError for one that is not finite."""
        logits = logits.float()
        scores = logits[:, 0] if logits.shape[1] == 1 else logits[:, self.positive] - logits[:, 1 - self.positive]
        fix = "A failure never becomes a reward: check the reward model's weights and dtype."
        return check_finite("score", scores, fix, error=ScoreError)

    def positions(self, ids: Tensor) -> Tensor:
        """Return (B,) int64, the position of the score: the rightmost id ≠ pad, or 0 for encoders (CLS)."""
        if not is_decoder(self.model):
            return torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
        pad = self.model.config.get_text_config().pad_token_id
        index = torch.arange(ids.shape[1], device=ids.device)
        last: Tensor = (index * (ids != pad)).argmax(dim=1)
        return last


def is_decoder(model: Any) -> bool:
    """Whether the model's layers are causal; encoders compute their score at the first token."""
    causal = [m.is_causal for m in model.modules() if hasattr(m, "is_causal")]
    return bool(causal[-1]) if causal else True


def load_reward(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    pad_token: str | None = None,
    field: str = "reward_model",
    policy: PolicyText | None = None,
    fast_kernels: bool = True,
) -> RewardModel:
    """Return the reward model called `name`: a folder or hub id of a sequence classifier with 1 or 2 labels.

    Args:
        policy: whose rollouts it is to score. A decoder with the policy's vocabulary scores their ids; every other
            model scores their text through its own tokenizer, with `pad_token` only if its vocabulary has that.
        fast_kernels: compute with the equivalents of `models.fast`.

    Raises:
        ModelError: it cannot be loaded, its head is not stored, it has no pad token distinct from EOS, or it has its
            own tokenizer that does not return character offsets.
    """
    folder = locate(field, name)
    where = pick_device(device)
    tokenizer = read_tokenizer(field, folder)
    foreign = policy is not None and tokenizer.get_vocab() != policy.tokenizer.get_vocab()
    if foreign:
        pad_token = pad_token if pad_token in tokenizer.get_vocab() else None
        check_tokenizer(field, tokenizer)
    tokenizer = with_pad(field, tokenizer, pad_token)
    model: Any = load_classifier(field, folder, pick_dtype(dtype, where), where, fast_kernels=fast_kernels)
    text_config = model.config.get_text_config()
    if pad_token is not None or text_config.pad_token_id is None:
        text_config.pad_token_id = tokenizer.pad_token_id
    stored = read_statistics(Path(folder))
    text = policy if foreign or not is_decoder(model) else None
    if text is not None:
        check_tokenizer(field, tokenizer)
        check_model(field, model, tokenizer)
    return RewardModel(model, tokenizer, positive_label(model.config), **stored, text=text)


def positive_label(config: Any) -> int:
    """Return the index of the positive label by its name, else 1."""
    names = {int(i): str(label).lower() for i, label in (config.id2label or {}).items()}
    return next((i for i, label in names.items() if label.startswith("pos")), 1)


def read_statistics(folder: Path) -> dict[str, float]:
    """Return {"mean", "sd"} of R stored beside the weights, or nothing. Raises ModelError for a damaged file."""
    path = folder / STATISTICS
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text())
        statistics = {"mean": float(stored["mean"]), "sd": float(stored["sd"])}
        if not all(map(math.isfinite, statistics.values())):
            raise ValueError(f"not finite: {statistics}")
        return statistics
    except (ValueError, KeyError, TypeError) as error:
        fix = "Delete the file, or evaluate the reward model again."
        raise ModelError(str(path), str(error), '{"mean": number, "sd": number}', fix) from error


def adjust(scores: Tensor, reward: RewardModel, config: ScoreConfig) -> Tensor:
    """Return scores (B,) centred and scaled by the reward model's statistics, then clipped.

    Raises:
        ConfigError: centring or scaling is requested, and the reward model's folder has no statistics.
    """
    if config.center or config.scale:
        if reward.mean is None or reward.sd is None:
            got = "a reward model without reward.json beside its weights"
            fix = 'Write {"mean": m, "sd": s} of its scores there, or set scores.center and scores.scale to false.'
            raise ConfigError("scores.center/scale", got, "its mean and sd", fix)
        scores = scores - reward.mean if config.center else scores
        scores = scores / max(reward.sd, 1e-6) if config.scale else scores
    return scores if config.clip is None else scores.clamp(-config.clip, config.clip)
