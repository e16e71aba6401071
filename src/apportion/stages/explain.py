"""Credit of one text under a reward model: its tokens, its score, and the rewards of each credit method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apportion import credit, registry
from apportion.config import ScoreConfig
from apportion.credit import REWARD_ATTENTION
from apportion.errors import ConfigError, DataError, ModelError, ScoreError
from apportion.evidence import PRODUCERS, Models
from apportion.evidence.scoring import score
from apportion.generation.given import given_rollouts
from apportion.models.policy import Policy
from apportion.models.reward import RewardModel
from apportion.models.text.bos import special_around
from apportion.models.text.render import check_embeddings, context_limit
from apportion.registry import EvidenceKey
from apportion.types import Credit, Rollouts

# evidence that takes a reward model alone
AVAILABLE = PRODUCERS["reward"].provides | PRODUCERS["attribution"].provides | PRODUCERS["shapley"].provides


class TextCredit(NamedTuple):
    """The credit of one text: its tokens, its score, each method's reward on each token, and the attention on it.

    `kept_mass` is None where the model's attention cannot be read.
    """

    prompt: str
    tokens: list[str]
    ids: list[int]
    score: float
    methods: dict[str, list[float]]
    kept_mass: float | None


def text_methods(specs: list[tuple[str, dict[str, Any]]]) -> dict[str, Credit]:
    """Return the credit methods by name. Raises ConfigError for one that needs more than a reward model."""
    methods = {}
    for name, kwargs in specs:
        method = registry.call("method", name, credit.find(name), kwargs)
        lacking = ", ".join(sorted(n for n in method.needs if not _available(n)))
        if lacking:
            fix = f"It needs {lacking}, which needs a policy: use it in `apportion rl`."
            known = ", ".join(n for n, f in credit.METHODS.items() if all(_available(need) for need in f().needs))
            raise ConfigError("--method", name, f"one of {known}", fix)
        methods[name] = method
    return methods


def _available(need: str) -> bool:
    """Whether a reward model is enough for the evidence `need`."""
    return EvidenceKey.of(need).name in AVAILABLE


def apportion_text(
    reward: RewardModel,
    prompt: str,
    text: str,
    methods: dict[str, Credit],
    warn: Callable[[str], None] = lambda line: None,
) -> TextCredit:
    """Return the credit of `text` as a response to `prompt` ("" for none).

    The special tokens that the tokenizer adds are part of every text that is scored, prefixes and coalitions too, and
    get no credit. Attention, prefix scores of most decoders and the score itself take one forward; attributions,
    Shapley values and an encoder's prefixes further ones. Where the model's attention cannot be read, and no method
    needs it, `kept_mass` is None and `warn` is called with one line.

    Raises:
        DataError: the text is empty, too long for the model, or ends with its pad token.
        ModelError: a method needs attention, and this model's cannot be read.
    """
    ids, first, last = _encode(reward, prompt, text)
    reward = replace(reward, suffix=tuple(ids[0, last:].tolist()))
    row = ids[0].tolist()
    rollouts = given_rollouts([row[:first]], [row[first:last]], 0, ids.device)  # one row: nothing is padded
    needs = frozenset[str]().union(*(method.needs for method in methods.values()))
    result = _scored(reward, rollouts, needs, text, warn)
    assert result.scores is not None
    chosen = ids[0, first:last].tolist()
    by_method = {name: credit.apply(method, result)[0][0].tolist() for name, method in methods.items()}
    tokens = [reward.tokenizer.decode([i]) for i in chosen]
    mass = float(result.evidence[REWARD_ATTENTION].sum()) if REWARD_ATTENTION in result.evidence else None
    return TextCredit(prompt, tokens, chosen, float(result.scores[0]), by_method, mass)


def _scored(
    reward: RewardModel, rollouts: Rollouts, needs: frozenset[str], text: str, warn: Callable[[str], None]
) -> Rollouts:
    """Return the rollout with its score and the evidence of `needs`, and the attention on it where it can be read."""
    policy = Policy(None, reward.tokenizer, [])  # only its tokenizer is used
    produce = partial(score, Models(policy, reward), rollouts, config=ScoreConfig(), always=frozenset({"scores"}))
    try:
        try:
            return produce(needs=needs | {REWARD_ATTENTION})
        except ModelError as error:
            result = produce(needs=needs)  # raises where a method needs what is missing
            warn(f"the share of attention on the text is left out: {error.field}: {error.got}")
            return result
    except ScoreError as error:
        if error.field != "pooled position":
            raise
        got = f"{text[-20:]!r}, which ends with the model's pad token"
        fix = "Remove it, since the score is taken before it, or choose another --pad_token."
        raise DataError("--text", got, "a text that is scored at its last token", fix) from error


def _encode(reward: RewardModel, prompt: str, text: str) -> tuple[Tensor, int, int]:
    """Return (ids (1,K), where the text's own tokens begin and end); prompt and text are tokenised as in a rollout."""
    if not text.strip():
        raise DataError("--text", text, "a text", "Write the response to apportion.")
    tokenizer, device = reward.tokenizer, next(reward.model.parameters()).device
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    after = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not after:
        fix = "This tokenizer removes all of its characters: use another text."
        raise DataError("--text", text, "a text of at least one token", fix)
    start, end = special_around(tokenizer)
    built = [*start, *before, *after, *end]
    limit = context_limit(reward.model, tokenizer)
    if len(built) > limit:
        raise DataError("--text", f"{len(built)} tokens", f"at most {limit} tokens", "Shorten it.")
    check_embeddings("--model", reward.model, tokenizer, [built])
    first = len(start) + len(before)
    return torch.tensor([built], device=device), first, first + len(after)
