"""Credit of one text under a reward model: its tokens, its score, and the rewards of each credit method."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from apportion import credit, registry
from apportion.config import ScoreConfig
from apportion.credit import REWARD_ATTENTION, requested_attention
from apportion.errors import ConfigError, DataError
from apportion.evidence import PRODUCERS, Models
from apportion.evidence.scoring import score
from apportion.models.policy import Policy
from apportion.models.reward import RewardModel, is_decoder
from apportion.models.text.render import context_limit
from apportion.registry import EvidenceKey
from apportion.types import Credit, Rollouts

# evidence from only a reward model: attention comes with the scoring forward, the rest takes further passes
FURTHER = PRODUCERS["attribution"].provides | PRODUCERS["shapley"].provides | {"prefix_scores", "prompt_score"}
AVAILABLE = FURTHER | {REWARD_ATTENTION}


class TextCredit(NamedTuple):
    """The credit of one text: its tokens, its score, each method's reward on each token, and the attention on it."""

    prompt: str
    tokens: list[str]
    ids: list[int]
    score: float
    methods: dict[str, list[float]]
    kept_mass: float


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


def apportion_text(reward: RewardModel, prompt: str, text: str, methods: dict[str, Credit]) -> TextCredit:
    """Return the credit of `text` as a response to `prompt` ("" for none), in one forward of the reward model.

    The special tokens that the tokenizer adds are part of the input and get no credit. Methods that need more than
    attention (prefix scores, attributions, Shapley values) take further passes and need a decoder.

    Raises:
        DataError: the text is empty, too long for the model, or ends with its pad token.
        ConfigError: a method that needs a decoder, with an encoder.
    """
    ids, response = _encode(reward, prompt, text)
    wanted = frozenset({REWARD_ATTENTION}).union(*(method.needs for method in methods.values()))
    further = frozenset(name for name in wanted if EvidenceKey.of(name).name in FURTHER)
    names = sorted(wanted - further)
    specs = [requested_attention(name) for name in names]
    scores, rows, at = reward.forward(ids, torch.ones_like(ids, dtype=torch.bool), specs)
    rows_by_name = dict(zip(names, rows, strict=True))
    if is_decoder(reward.model) and int(at) != ids.shape[1] - 1:
        got = f"{text[-20:]!r}, which ends with the model's pad token"
        fix = "Remove it, since the score is taken before it, or choose another --pad_token."
        raise DataError("--text", got, "a text that is scored at its last token", fix)
    rollouts = _as_rollout(ids, response, scores, rows_by_name)
    if further:
        rollouts = _with_further(reward, rollouts, further)
    chosen = ids[0, response].tolist()
    by_method = {name: credit.apply(method, rollouts)[0][0].tolist() for name, method in methods.items()}
    tokens = [reward.tokenizer.decode([i]) for i in chosen]
    return TextCredit(
        prompt, tokens, chosen, float(scores[0]), by_method, float(rows_by_name[REWARD_ATTENTION][0, response].sum())
    )


def _with_further(reward: RewardModel, rollouts: Rollouts, needs: frozenset[str]) -> Rollouts:
    """Return the rollout with evidence of further passes added."""
    if not is_decoder(reward.model):
        fix = "Use a decoder, or attention, uniform or sparse."
        raise ConfigError("--method", ", ".join(sorted(needs)), "evidence that an encoder can give", fix)
    policy = Policy(None, reward.tokenizer, [])  # only its tokenizer is used
    return score(Models(policy, reward), rollouts, needs, ScoreConfig(), frozenset({"scores"}))


def _encode(reward: RewardModel, prompt: str, text: str) -> tuple[Tensor, Tensor]:
    """Return (ids (1,K), positions (n,) of the text's own tokens); prompt and text are tokenised as in a rollout."""
    if not text.strip():
        raise DataError("--text", text, "a text", "Write the response to apportion.")
    tokenizer, device = reward.tokenizer, next(reward.model.parameters()).device
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    after = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not after:
        fix = "This tokenizer removes all of its characters: use another text."
        raise DataError("--text", text, "a text of at least one token", fix)
    built, start = _with_special(tokenizer, [*before, *after])
    limit = context_limit(reward.model, tokenizer)
    if len(built) > limit:
        raise DataError("--text", f"{len(built)} tokens", f"at most {limit} tokens", "Shorten it.")
    first = start + len(before)
    positions = torch.arange(first, first + len(after), device=device)
    return torch.tensor([built], device=device), positions


def _with_special(tokenizer: Any, ids: list[int]) -> tuple[list[int], int]:
    """Return (`ids` between the special tokens that the tokenizer puts around one sequence, where `ids` begin)."""
    marked = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    at = next(i for i in range(len(marked)) if marked[i : i + len(plain)] == plain)
    return [*marked[:at], *ids, *marked[at + len(plain) :]], at


def _as_rollout(ids: Tensor, response: Tensor, scores: Tensor, rows: dict[str, Tensor]) -> Rollouts:
    mask = torch.ones(1, len(response), dtype=torch.bool, device=ids.device)
    first = int(response[0])
    return Rollouts(
        prompt_ids=ids[:, :first],
        prompt_mask=torch.ones(1, first, dtype=torch.bool, device=ids.device),
        response_ids=ids[:, response],
        mask=mask,
        logprobs=torch.zeros(mask.shape, device=ids.device),
        scores=scores,
        group=torch.zeros(1, dtype=torch.int64, device=ids.device),
        evidence={name: row[:, response] for name, row in rows.items()},
    )
