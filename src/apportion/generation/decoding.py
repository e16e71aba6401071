"""The way in which a model is sampled from: by its cache, or without one; tried once on a few tokens.

A model's past may be elsewhere than in `past_key_values`, or its forward may treat padding as text. Two ragged texts
tell: the sampler's, the trainer's and each text's own log-probabilities have to agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apportion.distributed.sharding import plain_class
from apportion.errors import ApportionError, ModelError
from apportion.generation.decode import left_pad
from apportion.generation.llama import LlamaStepModel, is_llama
from apportion.generation.recompute import RecomputeStepModel
from apportion.generation.step_model import StepModel, extra_padding
from apportion.models.families import OTHERS, bare, forward_errors
from apportion.models.fast import has_fast_kernels
from apportion.models.policy import Policy, width_of
from apportion.models.shared_prompt import has_past
from apportion.system.memory import is_out_of_memory
from apportion.types import Rollouts

# classes whose cache is known to be exact; every other one is tried
KNOWN = frozenset({
    "BloomForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "GptOssForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "OPTForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
})  # fmt: skip
# largest mean difference of log-probabilities, nats a token: rounding of two forwards is below it, a lost past above
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
LENGTHS = (5, 3)  # tokens of the prompts that are tried
STEPS = 2
SLOW = "computes the whole text again for every token, so that sampling is slow"


class Decoding(NamedTuple):
    """How a model is sampled from: the class of its steps, and why not by its cache (None where it is)."""

    steps: type[StepModel]
    why_slow: str | None = None


class Attempt(NamedTuple):
    """The result of one trial: how far log-probabilities are apart, nats a token, or the error of the model."""

    gap: float
    error: Exception | None = None

    def describe(self) -> str:
        """Return the result of the trial, for a message."""
        if self.error is None:
            return f"off by {self.gap:.2g} nats a token"
        first = (str(self.error).splitlines() or [""])[0][:200]
        return f"stopped by {type(self.error).__name__}: {first}".removesuffix(": ")


def make_step_model(policy: Policy, model: Any, rows: int, longest: int) -> StepModel:
    """Return the decoding steps of `model`: a Llama's written out where it has fast kernels, else its own forward.

    Raises:
        ModelError: as `decoding` does.
    """
    kind = decoding(policy, model).steps
    if kind is StepModel and has_fast_kernels(model) and is_llama(model):
        kind = LlamaStepModel
    return kind(policy, model, rows, longest)


def decoding(policy: Policy, model: Any) -> Decoding:
    """Return how `model`, the policy's or its reference, is sampled from: with its cache, or without.

    The result is kept in `policy.decoding`. Where only computing a prompt once for all its responses would be wrong,
    `policy.shares` becomes False.

    Raises:
        ModelError: log-probabilities depend on padding or on later tokens, or no way of decoding is exact.
    """
    name = class_name(model)
    if name in KNOWN:
        return Decoding(StepModel)
    if name not in policy.decoding:
        with forward_errors("policy", bare(model), "compute a few tokens", "a causal language model", OTHERS):
            policy.decoding[name] = tried(policy, model)
    known: Decoding = policy.decoding[name]
    return known


def class_name(model: Any) -> str:
    """Return the name of the model's class, without wrappers of adapters and of sharding."""
    return plain_class(bare(model)).__name__


@torch.no_grad()
def tried(policy: Policy, model: Any) -> Decoding:
    """Return what `decoding` does, from a few forwards of the model, whatever its class."""
    name = class_name(model)
    texts = _texts(policy)
    alone = [_alone(policy, model, text) for text in texts]
    if not all(bool(torch.isfinite(one).any()) for one in alone):
        return Decoding(StepModel)  # weights that are not finite have an error of their own, where a token is sampled
    limit = CLOSE.get(next(model.parameters()).dtype, 1e-3) / min(1.0, policy.temperature)
    earlier = [_alone(policy, model, text[:-1]) for text in texts]
    gap = max(_gap(one[:-1], other) for one, other in zip(alone, earlier, strict=True))
    if not gap <= limit:
        raise _refused(name, f"a token changes earlier log-probabilities by {gap:.2g} nats", "a causal language model")
    padded = attempt(lambda: _trainer_gap(policy, model, texts, alone))
    if not padded.gap <= limit and policy.shares:
        policy.shares = False
        padded = attempt(lambda: _trainer_gap(policy, model, texts, alone))
    if not padded.gap <= limit:
        why = f"its forward of padded texts is {padded.describe()}"
        raise _refused(name, why, "a model that masks padding") from padded.error
    why_slow = None if has_past(model) else "it takes no cache of keys and values"
    if why_slow is None:
        cached = attempt(lambda: _steps_gap(StepModel, policy, model, texts, alone))
        if cached.gap <= limit:
            return Decoding(StepModel)
        why_slow = f"with its cache it is {cached.describe()}"
    whole = attempt(lambda: _steps_gap(RecomputeStepModel, policy, model, texts, alone))
    if whole.gap <= limit:
        return Decoding(RecomputeStepModel, why_slow)
    why = f"{why_slow}; without one it is {whole.describe()}"
    raise _refused(name, why, "a model that can be sampled from exactly") from whole.error


def attempt(trial: Callable[[], float]) -> Attempt:
    """Return the result of `trial`. An error of the model's own code is a result too, for any model may come here.

    Raises:
        ApportionError, or an error of memory: these say nothing of the model.
    """
    try:
        return Attempt(trial())
    except Exception as error:  # classes of transformers raise many types for what they lack
        if isinstance(error, ApportionError) or is_out_of_memory(error):
            raise
        return Attempt(math.nan, error)


def _refused(name: str, why: str, expected: str) -> ModelError:
    return ModelError("policy", f"{name}: {why}", expected, OTHERS)


def _texts(policy: Policy) -> list[list[int]]:
    """Return two texts of ids that may be sampled, from all over the vocabulary."""
    width = width_of(policy.model)
    excluded = {*policy.banned, *policy.ends, policy.pad}
    usable = [i for i in range(width) if i not in excluded] or list(range(width))
    count = sum(LENGTHS) + STEPS * len(LENGTHS)
    spread = [usable[(7 * i + 3) * len(usable) // (7 * count) % len(usable)] for i in range(count)]
    return [spread[: LENGTHS[0] + STEPS], spread[LENGTHS[0] + STEPS :]]


def _alone(policy: Policy, model: Any, text: list[int]) -> Tensor:
    """Return the log-probabilities (n,V) before each token after the first and after the last, by the model itself."""
    ids = torch.tensor([text], device=policy.device)
    return policy.allowed(model(input_ids=ids).logits[0]).log_softmax(dim=-1)


def _gap(one: Tensor, other: Tensor) -> float:
    """Return the mean absolute difference where both are finite; NaN where a number is missing."""
    both = torch.isfinite(one) & torch.isfinite(other)
    return float((one - other)[both].abs().mean()) if bool(both.any()) else float("nan")


def _trainer_gap(policy: Policy, model: Any, texts: list[list[int]], alone: list[Tensor]) -> float:
    """Return how far the trainer's log-probabilities of the texts, padded and twice each, are from each text's own."""
    responses = [text[length:] for text, length in zip(texts, LENGTHS, strict=True)]
    prompts = [text[:length] for text, length in zip(texts, LENGTHS, strict=True)]
    ids, mask = left_pad([prompt for prompt in prompts for _ in range(2)], policy.pad, 1)
    # one response of each prompt is cut, so that padding is on the right too
    on = torch.tensor([[True] * STEPS, [True] * (STEPS - 1) + [False]] * len(texts))
    out = torch.tensor([response for response in responses for _ in range(2)]).masked_fill(~on, policy.pad)
    group = torch.arange(len(texts)).repeat_interleave(2)
    ids, mask, out, on, group = (t.to(policy.device) for t in (ids, mask, out, on, group))
    zeros = torch.zeros(on.shape, device=policy.device)
    batch = Rollouts(prompt_ids=ids, prompt_mask=mask, response_ids=out, mask=on, logprobs=zeros, group=group)
    found = policy.score_tokens(model, batch, entropy=False)[0]
    own = [
        rows[length - 1 : -1].gather(1, torch.tensor(response, device=rows.device)[:, None])[:, 0]
        for rows, length, response in zip(alone, LENGTHS, responses, strict=True)
    ]
    expected = torch.stack([row for row in own for _ in range(2)])
    return _gap(found[batch.mask], expected[batch.mask])


def _steps_gap(kind: type[StepModel], policy: Policy, model: Any, texts: list[list[int]], alone: list[Tensor]) -> float:
    """Return how far a prefill and two steps of both texts are from each text's own log-probabilities."""
    prompts = [text[:length] for text, length in zip(texts, LENGTHS, strict=True)]
    ids, mask = (t.to(policy.device) for t in left_pad(prompts, policy.pad, extra_padding(policy.device)))
    source = torch.tensor([0, 1, 1], device=policy.device)  # a prompt with two responses among them
    positions = mask.sum(dim=1)[source]
    gaps = []
    steps = kind(policy, model, len(source), max(map(len, texts)))
    logits = steps.prefill(ids, mask, source)
    for step in range(STEPS + 1):
        found = policy.allowed(logits).log_softmax(dim=-1)
        rows = [alone[i][LENGTHS[i] - 1 + step] for i in source.tolist()]
        gaps += [_gap(one, other) for one, other in zip(found, rows, strict=True)]
        if step < STEPS:
            tokens = [texts[i][LENGTHS[i] + step] for i in source.tolist()]
            logits = steps.step(torch.tensor(tokens, device=policy.device), positions + step)
        if step == 0:  # a row leaves
            rest = torch.tensor([0, 2], device=policy.device)
            steps.past.keep_rows(rest)
            source, positions, logits = source[rest], positions[rest], logits[rest]
    return max(gaps, key=lambda gap: (gap != gap, gap))
