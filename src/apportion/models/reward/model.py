"""A loaded reward model: one score a sequence, the scored position, and the attention of that position."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from apportion.config.sections import ScoreConfig
from apportion.credit import AttentionSpec
from apportion.errors import ConfigError, ScoreError
from apportion.masking import check_finite, first_index, last_index
from apportion.models.attention.row import attention_row, needed_layers
from apportion.models.families import forward_errors
from apportion.models.reward.mean import stored_mean
from apportion.models.reward.reading import Reading, fill_id, inputs_of, own_pad, pad_set_to, read_model
from apportion.models.shared_prompt import Shared, prefill_prompts, response_inputs
from apportion.models.text.render import embedding_count
from apportion.models.text.token_spans import PolicyText
from apportion.types import Rollouts


@dataclass
class RewardModel:
    """A sequence classifier with 1 or 2 labels as R = logit, or logit(positive) − logit(negative), less `reward_mean`.

    Attributes:
        model: the classifier; tokenizer: its own.
        positive: index of the positive label when there are two.
        mean, sd: of R on the held-out set it was evaluated on; None when they are not stored beside the weights.
        text: decodes the policy's ids for a model that scores text; None where the model uses the policy's ids.
        suffix: ids that follow every text that is read as ids (special tokens of its tokenizer), for `credit`.
        notes: what its user should know, one sentence each.
    """

    model: Any
    tokenizer: Any
    positive: int = 1
    mean: float | None = None
    sd: float | None = None
    text: PolicyText | None = None
    suffix: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    _reading: Reading | None = field(default=None, repr=False)

    @property
    def reading(self) -> Reading:
        """How a batch is read, tried out once. Raises ModelError for one that scores no text."""
        if self._reading is None:
            self._reading = read_model(self.model)
        return self._reading

    def score(self, ids: Tensor, mask: Tensor, *, attention: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return (scores (B,), attention row (B,K) or None, positions (B,)) of padded sequences, in one forward.

        Args:
            ids: (B,K) int64; mask: (B,K) bool, padded on either side (models that are no decoders: right).
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

        The rows are those of the scored position. A model whose score depends on the batch's padding takes one forward
        a row. Otherwise as `score`.
        """
        if self.reads_alone(ids, mask):
            return self._one_at_a_time(ids, mask, specs)
        ids, inputs = self.inputs(ids, mask)
        positions = self.positions(ids, mask)
        tapped: Any = attention_row(self.model, needed_layers(specs)) if specs else contextlib.nullcontext()
        with pad_set_to(self.model, fill_id(self.model, ids, mask)), tapped as tap:
            logits = self._logits(inputs)
        scores = self.scores_of(logits)
        return scores, [] if tap is None else [tap.attention(spec, positions) for spec in specs], positions

    def _logits(self, inputs: dict[str, Any]) -> Tensor:
        """Return the logits of one forward. Raises ModelError where the model's own code fails on such a text."""
        rows, length = inputs["input_ids"].shape
        what, expected = f"score {rows} texts of up to {length} tokens", "a classifier that scores these texts"
        fix = "Give texts that it can read, through the tokenizer that it was trained with, or use another model."
        with forward_errors("reward_model", self.model, what, expected, fix):
            logits: Tensor = self.model(**inputs).logits
        return logits

    def reads_alone(self, ids: Tensor, mask: Tensor) -> bool:
        """Whether the rows of ids and mask, both (B,K), have to be read one at a time, without padding."""
        apart = not self.reading.batched or fill_id(self.model, ids, mask) is None
        return apart and (len(ids) > 1 or not bool(mask.all()))

    def inputs(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (ids (B,K) with pads filled, the keyword arguments of one forward of them).

        Raises:
            ScoreError: an id without an embedding; it names the row.
        """
        ids, width = ids.masked_fill(~mask, fill_id(self.model, ids, mask) or 0), embedding_count(self.model)
        beyond = (ids >= width).any(dim=1)
        if beyond.any():
            row = int(beyond.nonzero()[0])
            fix = "Use a reward model as wide as the policy's vocabulary, or keep the policy from generating such ids."
            raise ScoreError("text", f"id {int(ids[row].max())}", f"ids below the model's {width}", fix, row=row)
        return ids, inputs_of(self.model, ids, mask, self.reading.position_ids)

    def _one_at_a_time(
        self, ids: Tensor, mask: Tensor, specs: Sequence[AttentionSpec]
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        scores, positions = torch.zeros(len(ids), device=ids.device), torch.zeros_like(ids[:, 0])
        rows = [torch.zeros(ids.shape, device=ids.device) for _ in specs]
        for i in range(len(ids)):
            places = mask[i].nonzero()[:, 0]
            alone = ids[i, places][None]
            try:
                score, attended, at = self.forward(alone, torch.ones_like(alone, dtype=torch.bool), specs)
            except ScoreError as error:
                error.row = i
                raise
            scores[i], positions[i] = score[0], places[at[0]]
            for row, one in zip(rows, attended, strict=True):
                row[i, places] = one[0].to(row)
        return scores, rows, positions

    @torch.no_grad()
    def forward_shared(
        self, rollouts: Rollouts, shared: Shared, specs: Sequence[AttentionSpec]
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return the result of `forward` for `rollouts` in this model's ids, each distinct prompt computed once."""
        ids = torch.cat([rollouts.prompt_ids, rollouts.response_ids], dim=1)
        mask, width = torch.cat([rollouts.prompt_mask, rollouts.valid], dim=1), rollouts.prompt_ids.shape[1]
        fill = fill_id(self.model, ids, mask) or 0
        ids = ids.masked_fill(~mask, fill)
        rollouts = replace(rollouts, prompt_ids=ids[:, :width], response_ids=ids[:, width:])

        def run(keep: int, **inputs: Any) -> Tensor:
            states: Tensor = self.model.base_model(**inputs).last_hidden_state
            return states[:, -keep:]

        _, past = prefill_prompts(run, rollouts, shared)
        inputs = response_inputs(rollouts, past)
        positions = self.positions(rollouts.response_ids, rollouts.valid)  # in the response: the only input here
        tapped: Any = attention_row(self.model, needed_layers(specs)) if specs else contextlib.nullcontext()
        with pad_set_to(self.model, fill), tapped as tap:
            logits = self.model(**inputs).logits
        rows = [] if tap is None else [tap.attention(spec, positions) for spec in specs]
        return self.scores_of(logits), rows, width + positions

    def unchecked_scores(self, logits: Tensor) -> Tensor:
        """Return R (…) float32 of logits (…, 1 or 2), finite or not, less the stored mean of the model's settings."""
        logits = logits.float()
        two = logits.shape[-1] == 2
        scores = logits[..., self.positive] - logits[..., 1 - self.positive] if two else logits[..., 0]
        return scores - stored_mean(self.model.config)

    def scores_of(self, logits: Tensor) -> Tensor:
        """Return R (B,) float32 from logits (B, 1 or 2). Raises ScoreError for one that is not finite."""
        fix = "A failure never becomes a reward: check the reward model's weights and dtype."
        return check_finite("score", self.unchecked_scores(logits), fix, error=ScoreError)

    def positions(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return (B,) int64, the position of the score of filled `ids` (B,K): the first, or the last that is no pad.

        As the classifier itself does, ids at the end that equal its own pad id are skipped. Where the score is pooled
        over positions it is the last one.
        """
        if self.reading.place == "first":
            return torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
        pad = own_pad(self.model)
        if pad is None or self.reading.place == "pooled" or not self.reading.skips_pads:
            return last_index(mask).clamp_min(0)
        index = torch.arange(ids.shape[1], device=ids.device)
        last: Tensor = (index * (ids != pad)).argmax(dim=1)
        return last

    def check_positions(self, positions: Tensor, mask: Tensor) -> None:
        """Raise ScoreError where `positions` (B,) are not those of whole texts on `mask` (B,K); it names the row.

        A text may end with the model's pad id where that is also its EOS: the classifier skips it, and so do we.
        """
        if self.reading.place == "pooled" or (self.reading.place == "last" and self.pads_with_end):
            return
        expected_at = first_index(mask) if self.reading.place == "first" else last_index(mask)
        wrong = positions != expected_at
        if wrong.any():
            row = int(wrong.nonzero()[0])
            expected = f"{int(expected_at[row])}, the last token of the response"
            fix = "The reward model's pad id occurs in the response: give it a pad token that is never sampled."
            raise ScoreError("pooled position", int(positions[row]), expected, fix, row=row)

    @property
    def pads_with_end(self) -> bool:
        """Whether the model's own pad id is also one that ends its texts."""
        named = getattr(self.model.config.get_text_config(), "eos_token_id", None)
        ends = {getattr(self.tokenizer, "eos_token_id", None), *(named if isinstance(named, list | tuple) else [named])}
        return own_pad(self.model) in ends - {None}


def adjust(scores: Tensor, reward: RewardModel | None, config: ScoreConfig) -> Tensor:
    """Return scores (B,) centred and scaled by the reward model's statistics, then clipped.

    Raises:
        ConfigError: centring or scaling is requested, and the reward model's folder has no statistics.
    """
    if config.center or config.scale:
        if reward is None or reward.mean is None or reward.sd is None:
            got = "a reward model without reward.json beside its weights"
            fix = 'Write {"mean": m, "sd": s} of its scores there, or set scores.center and scores.scale to false.'
            raise ConfigError("scores.center/scale", got, "its mean and sd", fix)
        scores = scores - reward.mean if config.center else scores
        scores = scores / max(reward.sd, 1e-6) if config.scale else scores
    return scores if config.clip is None else scores.clamp(-config.clip, config.clip)
