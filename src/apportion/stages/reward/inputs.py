"""Inputs of a reward model's training: excerpts of labelled texts or ranked completions, and the classifier."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from apportion.config import RewardConfig
from apportion.data import Labelled, Layout, labelled_splits
from apportion.data.bad_rows import leaving_out
from apportion.errors import ConfigError, DataError, ModelError
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
from apportion.models.stored_head import HEADS
from apportion.models.text.bos import added_bos
from apportion.models.text.labelled import chat_renderer
from apportion.models.text.render import check_embeddings
from apportion.models.tokenizers import read_tokenizer, with_pad
from apportion.stages.reward.evaluation import token_ids
from apportion.stages.reward.excerpts import (
    Excerpt,
    ExcerptPair,
    RankedExcerpts,
    TokenRows,
    flat,
    random_cuts,
)
from apportion.stages.reward.probe import probe_count, probe_head
from apportion.stages.reward.ranked_inputs import ranked_splits, reads_rankings
from apportion.training import rng
from apportion.training.monitoring import warn
from apportion.training.run_folder import RunFolder, require_space


class Inputs(NamedTuple):
    """Excerpts to train on and rows to evaluate on.

    Attributes:
        excerpts: to train on, single ones, pairs or ranked ones. test_rows: held-out rows, or ranked excerpts.
        tokenizer, folder: of the model it starts from.
        centred: excerpts whose mean reward is to be 0. over: what they are, in words.
    """

    excerpts: list[Excerpt] | list[ExcerptPair] | list[RankedExcerpts]
    tokenizer: Any
    folder: str
    test_rows: list[Any]
    centred: Sequence[Excerpt] = ()
    over: str = ""

    @property
    def ranked(self) -> bool:
        """Whether the excerpts are ranked ones."""
        return isinstance(self.excerpts[0], RankedExcerpts)


def prepare(run: RunFolder, config: RewardConfig) -> tuple[Any, Inputs]:
    """Return (model, inputs). Cheap checks come before the model."""
    return prepare_rankings(run, config) if reads_rankings(config) else prepare_labelled(run, config)


def prepare_rankings(run: RunFolder, config: RewardConfig) -> tuple[Any, Inputs]:
    """Return (model, inputs) of rankings. Cheap checks come before the model."""
    load = cache(lambda: tokenizer_of(config))
    with leaving_out(run.path, config.skip_bad_rows) as bad:
        found = ranked_splits(config, load, bad)
    require_space(run.path, 800_000_000 if config.model == "smollm2" else 100_000_000)
    folder, device, tokenizer = locate("model", config.model), pick_device(config.device), load()
    completions = flat(found.training)
    check_padding(tokenizer, completions)
    warn_pads(completions, tokenizer)
    rng.seed(config.seed)
    model = classifier(config, folder, tokenizer, device, found.training)
    return model, Inputs(found.training, tokenizer, folder, found.held_out, found.centred, found.over)


def prepare_labelled(run: RunFolder, config: RewardConfig) -> tuple[Any, Inputs]:
    """Return (model, inputs) of labelled texts, or of pairs as excerpts. Cheap checks come before the model."""
    with leaving_out(run.path, config.skip_bad_rows) as bad:
        train_rows, test_rows = labelled_splits(
            config.data,
            config.test_data,
            config.test_texts,
            bad,
            layout=Layout.of(config),
            render=chat_renderer(lambda: tokenizer_of(config)),
        )
    require_space(run.path, 800_000_000 if config.model == "smollm2" else 100_000_000)
    folder, device = locate("model", config.model), pick_device(config.device)
    tokenizer = tokenizer_of(config)
    context = context_of(folder, "model")
    if config.excerpt_tokens[1] > context:
        expected = f"at most the model's context of {context} tokens"
        raise ConfigError("excerpt_tokens", config.excerpt_tokens, expected, "Lower the second number.")
    tokens = token_ids(train_rows, tokenizer, config)
    check_room(train_rows, tokens, config.excerpt_tokens[1], context)
    if any(row.prompt or row.paired for row in test_rows):
        check_room(test_rows, token_ids(test_rows, tokenizer, config), config.excerpt_tokens[1], context)
    excerpts = random_cuts(tokens, config.excerpts, config.excerpt_tokens, config.seed)
    check_padding(tokenizer, flat(excerpts))
    warn_special([*train_rows, *test_rows], flat(excerpts), tokenizer)
    rng.seed(config.seed)
    return classifier(config, folder, tokenizer, device, excerpts), Inputs(excerpts, tokenizer, folder, test_rows)


def tokenizer_of(config: RewardConfig) -> Any:
    """Return the tokenizer of the model to train, with its pad token. Raises ModelError."""
    return with_pad("model", read_tokenizer("model", locate("model", config.model)), config.pad_token)


def check_room(rows: Sequence[Labelled], tokens: TokenRows, longest: int, context: int) -> None:
    """Raise DataError for a text whose prompt and special tokens leave no room for `longest` tokens in the context."""
    for row, prompt, around in zip(rows, tokens.prompts, tokens.around, strict=True):
        most = context - longest - sum(map(len, around))
        if prompt > most:
            got = f"{prompt} tokens before the answer, and {sum(map(len, around))} special ones: {row.text[:40]!r}…"
            expected = f"at most {most}: the context of {context} holds an excerpt of {longest} as well"
            raise DataError("data", got, expected, "Shorten or drop it, or lower the second number of excerpt_tokens.")


def warn_special(rows: Sequence[Labelled], excerpts: Sequence[Excerpt], tokenizer: Any) -> None:
    """Warn of texts that begin with the BOS which the tokenizer writes by itself, and of pad tokens in excerpts."""
    bos = added_bos(tokenizer)
    count = sum(row.text.startswith(bos) for row in rows) if bos else 0
    if count:
        warn(f"{count} of {len(rows)} texts begin with BOS {bos!r}, which the tokenizer adds: it is written once.")
    warn_pads(excerpts, tokenizer)


def warn_pads(excerpts: Sequence[Excerpt], tokenizer: Any) -> None:
    """Warn of pad tokens in excerpts."""
    pads = sum(tokenizer.pad_token_id in excerpt.ids for excerpt in excerpts)
    if pads:
        pad = tokenizer.pad_token
        warn(f"{pads} of {len(excerpts)} excerpts hold the pad token {pad!r}; where it comes last, it is not scored.")


def check_padding(tokenizer: Any, excerpts: Sequence[Excerpt]) -> None:
    """Raise ModelError for a pad token that also occurs in texts: a classifier scores the last token before it."""
    pad = tokenizer.pad_token_id
    reserved = "Pass --pad_token with a reserved token of the vocabulary that never occurs in text."
    if pad is None:
        raise ModelError("model's tokenizer", "neither a pad token nor EOS", "a pad token", reserved)
    if pad == tokenizer.eos_token_id and any(pad in excerpt.ids for excerpt in excerpts):
        got = f"pad {tokenizer.pad_token!r}, which ends texts"
        raise ModelError("model's tokenizer", got, "a pad token that occurs in no text", reserved)


def classifier(
    config: RewardConfig,
    folder: str,
    tokenizer: Any,
    device: torch.device,
    excerpts: Sequence[Excerpt | ExcerptPair] | Sequence[RankedExcerpts],
) -> Any:
    """Return the classifier to train: adapters and a float32 head over a 16-bit base, or all weights in float32.

    It has one label for ranked excerpts, and two for others.
    """
    lora = config.lora.rank > 0
    dtype = pick_dtype(config.dtype, device) if lora else torch.float32
    labels = 1 if isinstance(excerpts[0], RankedExcerpts) else 2
    model: Any = load_classifier("model", folder, dtype, device, new_head=labels, fast_kernels=config.fast_kernels)
    check_embeddings("model", model, tokenizer, (excerpt.ids for excerpt in flat(excerpts)))
    model.config.update(head_config(tokenizer, labels))
    use_fastest_attention(model, device, max(config.excerpt_tokens[1], *(len(one.ids) for one in excerpts)))
    head = next(name for name, _ in model.named_children() if name in HEADS)
    if config.probe_excerpts:
        probed = excerpts[: probe_count(excerpts, config.probe_excerpts)]
        probe_head(model, model.get_submodule(head), probed, tokenizer.pad_token_id)
    return add_adapter(model, config.lora, head=head).eval() if lora else model
