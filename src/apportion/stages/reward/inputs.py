"""Inputs of a reward model's training: excerpts of labelled texts, and the classifier to train."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from apportion.config import RewardConfig
from apportion.data import labelled_splits
from apportion.data.bad_rows import leaving_out
from apportion.errors import ConfigError, ModelError
from apportion.models.loading import (
    context_of,
    load_classifier,
    locate,
    pick_device,
    pick_dtype,
    use_fastest_attention,
)
from apportion.models.lora import add_adapter
from apportion.models.saving import head_config
from apportion.models.text.render import check_embeddings
from apportion.models.tokenizers import read_tokenizer, with_pad
from apportion.stages.reward.evaluation import token_ids
from apportion.stages.reward.excerpts import Excerpt, random_excerpts
from apportion.stages.reward.probe import probe_head
from apportion.training import rng
from apportion.training.run_folder import RunFolder, require_space

HEADS = ("score", "classifier")


class Inputs(NamedTuple):
    """Excerpts to train on and rows to evaluate on.

    Attributes:
        excerpts: to train on. tokenizer, folder: of the model it starts from. test_rows: held-out rows.
    """

    excerpts: list[Excerpt]
    tokenizer: Any
    folder: str
    test_rows: list[Any]


def prepare(run: RunFolder, config: RewardConfig) -> tuple[Any, Inputs]:
    """Return (model, inputs). Cheap checks come before the model."""
    with leaving_out(run.path, config.skip_bad_rows) as bad:
        train_rows, test_rows = labelled_splits(config.data, config.test_data, config.test_texts, bad)
    require_space(run.path, 800_000_000 if config.model == "smollm2" else 100_000_000)
    folder, device = locate("model", config.model), pick_device(config.device)
    tokenizer = with_pad("model", read_tokenizer("model", folder), config.pad_token)
    context = context_of(folder, "model")
    if config.excerpt_tokens[1] > context:
        expected = f"at most the model's context of {context} tokens"
        raise ConfigError("excerpt_tokens", config.excerpt_tokens, expected, "Lower the second number.")
    excerpts = random_excerpts(
        *token_ids(train_rows, tokenizer, config), config.excerpts, config.excerpt_tokens, config.seed
    )
    check_padding(tokenizer, excerpts)
    rng.seed(config.seed)
    return classifier(config, folder, tokenizer, device, excerpts), Inputs(excerpts, tokenizer, folder, test_rows)


def check_padding(tokenizer: Any, excerpts: list[Excerpt]) -> None:
    """Raise ModelError for a pad token that also occurs in texts: a classifier scores the last token before it."""
    pad = tokenizer.pad_token_id
    reserved = "Pass --pad_token with a reserved token of the vocabulary that never occurs in text."
    if pad is None:
        raise ModelError("model's tokenizer", "neither a pad token nor EOS", "a pad token", reserved)
    if pad == tokenizer.eos_token_id and any(pad in excerpt.ids for excerpt in excerpts):
        got = f"pad {tokenizer.pad_token!r}, which ends texts"
        raise ModelError("model's tokenizer", got, "a pad token that occurs in no text", reserved)


def classifier(config: RewardConfig, folder: str, tokenizer: Any, device: torch.device, excerpts: list[Excerpt]) -> Any:
    """Return the classifier to train: adapters and a float32 head over a 16-bit base, or all weights in float32."""
    lora = config.lora.rank > 0
    dtype = pick_dtype(config.dtype, device) if lora else torch.float32
    model: Any = load_classifier("model", folder, dtype, device, new_head=2, fast_kernels=config.fast_kernels)
    check_embeddings("model", model, tokenizer, (excerpt.ids for excerpt in excerpts))
    model.config.update(head_config(tokenizer))
    use_fastest_attention(model, device, config.excerpt_tokens[1])
    head = next(name for name, _ in model.named_children() if name in HEADS)
    if config.probe_excerpts:
        probe_head(model, model.get_submodule(head), excerpts[: config.probe_excerpts], tokenizer.pad_token_id)
    return add_adapter(model, config.lora, head=head).eval() if lora else model
