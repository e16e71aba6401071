"""Loading of a reward model: its head, its labels, and whether it reads the policy's ids or a text of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from apportion.errors import ModelError
from apportion.models.loading import load_classifier, locate, pick_device, pick_dtype, stored_labels
from apportion.models.pretrained import load_settings
from apportion.models.reward.model import RewardModel
from apportion.models.reward.reading import read_model
from apportion.models.stored_head import positive_label
from apportion.models.text.render import (
    check_embeddings,
    check_tokenizer,
    context_limit,
    embedding_count,
    encode,
    position_limit,
    render,
)
from apportion.models.text.template import check_template, renders_alike
from apportion.models.text.token_spans import PolicyText
from apportion.models.tokenizers import read_tokenizer, with_pad

LONGEST = 16  # prompts that are tried in a reward model's own tokenizer
STATISTICS = "reward.json"  # beside the weights: mean and sd of R on held-out text
ALONE = "padding changes its score, or it takes no padded batch: rows are scored one at a time, which is slow"
OWN_TEMPLATE = (
    "it has the policy's vocabulary and a chat template of its own: conversations are scored in its own rendering"
)


def load_reward(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    pad_token: str | None = None,
    field: str = "reward_model",
    policy: PolicyText | None = None,
    fast_kernels: bool = True,
    positive: str | None = None,
) -> RewardModel:
    """Return the reward model called `name`: a folder or hub id of a sequence classifier with 1 or 2 labels.

    Args:
        policy: whose rollouts it is to score. A decoder with the policy's vocabulary, and its rendering of
            conversations, scores their ids; every other model scores their text through its own tokenizer.
        pad_token: pads with this token of its vocabulary instead of its own; without any, masks tell padding.
        fast_kernels: compute with the equivalents of `models.fast`.
        positive: the setting `positive_label`: name or number of the label whose logit raises the score.

    Raises:
        ModelError: it cannot be loaded, its head is not stored, its labels do not say which one is good, it cannot
            score a text, or it reads text and its tokenizer returns no character offsets.
        ConfigError: `positive` is none of its labels.
    """
    folder = locate(field, name)
    where = pick_device(device)
    tokenizer = _padded_with(field, read_tokenizer(field, folder), pad_token, policy is None)
    foreign = policy is not None and not same_vocabulary(policy.tokenizer, tokenizer)
    templated = policy is not None and bool(policy.conversations) and bool(tokenizer.chat_template)
    own = policy is not None and templated and not foreign and not renders_alike(policy, tokenizer)
    if foreign or own:
        check_tokenizer(field, tokenizer)
    changes = None
    if policy is not None and templated and (foreign or own):
        changes = check_template(field, tokenizer, policy)
    settings = load_settings(field, folder)
    count = stored_labels(field, folder)
    names = settings.id2label if settings.num_labels == count else None
    chosen, convention = positive_label(field, names, count, positive)
    model: Any = load_classifier(field, folder, pick_dtype(dtype, where), where, fast_kernels=fast_kernels)
    text_config = model.config.get_text_config()
    if pad_token is not None and tokenizer.pad_token == pad_token and tokenizer.pad_token_id != tokenizer.eos_token_id:
        text_config.pad_token_id = tokenizer.pad_token_id
    reading = read_model(model, field)
    text = policy if foreign or own or not reading.decoder else None
    if text is not None:
        check_tokenizer(field, tokenizer)
        check_embeddings(field, model, tokenizer)
        changes = check_template(field, tokenizer, text) if templated and changes is None else changes
    alone = None if reading.batched else ALONE
    notes = [note for note in (convention, OWN_TEMPLATE if own else None, changes, alone) if note]
    stored = read_statistics(Path(folder))
    mean, sd = stored.get("mean"), stored.get("sd")
    return RewardModel(model, tokenizer, chosen, mean, sd, text, notes=tuple(notes), _reading=reading)


def _padded_with(field: str, tokenizer: Any, pad_token: str | None, demanded: bool) -> Any:
    """Return `tokenizer` with `pad_token`, where its vocabulary has it; an error without it only where `demanded`."""
    if pad_token is not None and pad_token in tokenizer.get_vocab():
        tokenizer.pad_token = pad_token
    elif pad_token is not None and demanded:
        return with_pad(field, tokenizer, pad_token)
    return tokenizer


def same_vocabulary(policy: Any, own: Any) -> bool:
    """Whether a tokenizer has the policy's tokens under the policy's ids; the policy may have one more, to pad with."""
    theirs, mine = policy.get_vocab(), own.get_vocab()
    if theirs == mine:
        return True
    return policy.pad_token not in mine and {t: i for t, i in theirs.items() if t != policy.pad_token} == mine


def check_width(
    field: str, reward: RewardModel, policy: Any, count: int, prompts: Iterable[Sequence[int]] = ()
) -> None:
    """Raise ModelError for a model that scores the policy's ids and has no embedding for one that may occur.

    Args:
        policy: the policy's tokenizer; count: the number of ids that the policy itself has an embedding for.
        prompts: ids of the prompts, which may have the pad token that the policy never generates.
    """
    if reward.text is not None:
        return
    width = embedding_count(reward.model)
    pad = policy.pad_token_id
    spare = {pad} - {policy.eos_token_id}  # never generated
    if pad is not None and pad >= width and any(pad in row for row in prompts):
        spare = set()
    used = [i for i in policy.get_vocab().values() if i < count and i not in spare]
    if max(used, default=0) >= width:
        got = f"a model of {width} embeddings, which reads the policy's ids up to {max(used)}"
        fix = "Use a reward model as wide as the policy's tokenizer, or call `resize_token_embeddings` and train it."
        raise ModelError(field, got, "an embedding for every token that the policy may generate", fix)


def check_length(field: str, reward: RewardModel, prompts: Sequence[Sequence[int]], new: int) -> None:
    """Raise ModelError for a model without positions for the longest of `prompts` (ids) and `new` tokens of a response.

    How many tokens a text has is not known before, for a model that scores text: the longest prompts alone have to fit.
    """
    fix = "Lower sampling.max_new_tokens, shorten the prompts, or use a reward model with a longer context."
    expected, limit = "a position for every token of prompt and response", position_limit(reward.model)
    if reward.text is None:
        longest = max(map(len, prompts), default=0) + new
        got = f"a model of {limit} positions, which scores the policy's ids, up to {longest} with the longest prompt"
    else:
        limit = context_limit(reward.model, reward.tokenizer)
        longest = max((_text_length(reward, row) for row in sorted(prompts, key=len)[-LONGEST:]), default=0)
        got = f"a model of {limit} positions, and a prompt of {longest - 1} tokens in its own tokenizer"
    if limit is not None and longest > limit:
        raise ModelError(field, got, expected, fix)


def _text_length(reward: RewardModel, prompt: Sequence[int]) -> int:
    """Return the number of tokens of a prompt and a short answer in the model's own tokenizer."""
    assert reward.text is not None
    answer = reward.text.tokenizer("a", add_special_tokens=False)["input_ids"]
    return len(encode(reward.tokenizer, render(reward.tokenizer, reward.text, prompt, answer)).ids)


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
