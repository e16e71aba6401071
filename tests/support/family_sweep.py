"""Every family of transformers as a tiny random model through our doors, beside transformers' own classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import family_configs
import tiny
import tiny_models
import tiny_runs
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from apportion.config.sections import LoraConfig
from apportion.errors import ApportionError, ModelError
from apportion.evidence.reward import reward_evidence
from apportion.generation.decoding import decoding
from apportion.generation.step_model import StepModel
from apportion.models import families
from apportion.models.families import policy_class
from apportion.models.loading import load_causal, load_classifier
from apportion.models.policy import Policy, load_policy
from apportion.models.pretrained import load_settings
from apportion.models.reward import RewardModel, load_reward
from apportion.models.saving import save_model, save_policy
from apportion.models.text.token_spans import PolicyText
from apportion.stages.explain import apportion_text, text_methods

TEXTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 300, 301, 302], [16, 17, 18, 19, 20]]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 300], [16, 17, 18, 19, 20]]
CLOSE = 1e-4  # of scores and of attention, relative to the largest
NATS = 1e-3  # of a token's log-probability
WORDS = "A lovely little picture."


class Row(NamedTuple):
    """What was found for a family: a word or a refusal for each question; "" where a refusal came before it."""

    family: str
    first: str  # a classifier's score, or how a policy is sampled from
    second: str = ""  # where a score is read, or sampled against recomputed
    third: str = ""  # attention, or adapters
    saved: str = ""


class Off(AssertionError):
    """A deviation that no error names."""


def swept(task: str, name: str, folder: Path) -> Row:
    """Return what the sweep of one family finds; raises where it is neither right nor refused."""
    why = family_configs.NOT_MADE[task].get(name)
    if why is not None:
        return Row(name, f"not tried: {why}")
    return classifier(name, folder) if task == "classifier" else causal(name, folder)


def built(name: str, task: str, folder: Path, **more: Any) -> Any:
    """Write a random model of the family `name` with a tokenizer to `folder`; return the class that reads it."""
    import transformers

    config = family_configs.tiny_config(name, **more)
    auto = transformers.AutoModelForSequenceClassification if task == "classifier" else policy_class(config)
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer_for(config).save_pretrained(folder)
    return auto


def tokenizer_for(config: Any) -> Any:
    """Return the tiny tokenizer; for an encoder with a decoder, which reads its score at EOS, one that appends EOS."""
    made = tiny.tokenizer()
    if getattr(config, "is_encoder_decoder", False):
        ending = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", family_configs.EOS)])
        made.backend_tokenizer.post_processor = ending
    return made


def close(found: Tensor, expected: Tensor, what: str, limit: float = CLOSE) -> None:
    """Raise Off where the two differ by more than rounding, or a number is missing."""
    size = float(expected.detach().abs().max().clamp_min(1.0)) if expected.numel() else 1.0
    gap = float((found.detach() - expected.detach()).abs().max()) if expected.numel() else 0.0
    if not gap <= limit * size:
        raise Off(f"{what}: off by {gap:.3g} of {size:.3g}")


def classifier(name: str, folder: Path) -> Row:
    """Sweep one family of classifiers; raises Off, or what a fault raises, where it is neither right nor refused."""
    auto = built(name, "classifier", folder, num_labels=1)
    own = auto.from_pretrained(folder, attn_implementation="eager").eval()
    texts = [[*ids, family_configs.EOS] for ids in TEXTS] if own.config.is_encoder_decoder else TEXTS
    trained(folder)
    try:
        reward = load_reward(str(folder), device="cpu")
    except ModelError as error:
        return Row(name, refusal(error))
    texts = [ids for ids in texts if readable(own, reward, ids)]
    alone = torch.tensor([tiny_models.own_score(own, ids) for ids in texts])
    if not float(alone.std()) > 1e-4:
        raise Off(f"its scores hardly differ: {alone.tolist()}")
    for left in (False, True) if reward.reading.causal else (False,):
        ids, mask = padded(texts, left=left)
        scores, _, positions = reward.score(ids, mask)
        close(scores, alone, f"scores, padded on the {'left' if left else 'right'}")
        reward.check_positions(positions, mask)
    place = brute_position(own, texts[0])
    if place != reward.reading.place:
        raise Off(f"read at the {reward.reading.place} token, and it is {place}")
    words = f"right{'' if reward.reading.batched else ', a row at a time'}"
    through_doors(reward, own, folder, texts)
    row = attention(reward, own, place, texts[0])
    save_model(reward.model, reward.tokenizer, folder / "again", "card")
    again = load_reward(str(folder / "again"), device="cpu")
    close(again.score(*padded(texts))[0], alone, "scores of the saved model")
    return Row(name, words, place, row, "right")


def refusal(error: ApportionError) -> str:
    """Return a refusal in words, after checking that it is one of ours with its parts."""
    assert error.has_parts and error.fix and "Traceback" not in str(error), str(error)
    return f"refused: {error.got}"


def readable(own: Any, reward: RewardModel, ids: list[int]) -> bool:
    """Whether the classifier itself can score a text (Funnel cannot read short ones); where not, ours says so."""
    try:
        tiny_models.own_score(own, ids)
    except RuntimeError:
        one = torch.tensor([ids])
        try:
            reward.score(one, torch.ones_like(one, dtype=torch.bool))
        except ModelError as error:
            refusal(error)
            return False
        raise Off("a text is scored that the classifier itself cannot score") from None
    return True


def padded(texts: Sequence[Sequence[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Return (ids, mask) of the texts, with at least one pad each."""
    width = max(map(len, texts)) + 1
    rows = [[0] * (width - len(t)) + [*t] if left else [*t] + [0] * (width - len(t)) for t in texts]
    mask = torch.arange(width) < torch.tensor([[len(t)] for t in texts])
    return torch.tensor(rows), mask.flip(1) if left else mask


@torch.no_grad()
def brute_position(model: Any, ids: Sequence[int]) -> str:
    """Return where the score is read: noise on the last states, one position at a time, and whether it moves.

    "pooled" where several do, or where the model has no state for each position.
    """
    source, call = source_of_states(model, ids)
    if source is None:
        return "pooled"
    before, moved = tiny_models.own_score(model, ids), []
    for at in range(len(ids)):
        calls = iter(range(1 << 20))

        def hook(module: nn.Module, args: Any, output: Any, at: int = at, calls: Any = calls) -> None:
            if next(calls) == call:  # a layer may run several times
                states = tensor_of(output)
                states[:, at] += torch.linspace(-1, 1, states.shape[-1])  # in place: a pooler in the model sees it too

        handle = source.register_forward_hook(hook)
        if tiny_models.own_score(model, ids) != before:
            moved.append(at)
        handle.remove()
    if len(moved) != 1:
        return "pooled"
    return {0: "first", len(ids) - 1: "last"}.get(moved[0], "pooled")


def source_of_states(model: Any, ids: Sequence[int]) -> tuple[nn.Module | None, int]:
    """Return the module that makes the trunk's last states (1,K,d), and in which of its calls; None without any."""
    seen: list[tuple[nn.Module, Any]] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: seen.append((module, tensor_of(output))))
        for module in model.base_model.modules()
    ]
    tiny_models.own_score(model, ids)
    for handle in handles:
        handle.remove()
    last = next(output for module, output in reversed(seen) if module is model.base_model)
    if not isinstance(last, Tensor) or last.shape[:2] != (1, len(ids)):
        return None, 0
    at, source = next((at, module) for at, (module, output) in enumerate(seen) if output is last)
    return source, sum(module is source for module, _ in seen[:at])


def tensor_of(output: Any) -> Any:
    """Return the states in what a module returned."""
    found = getattr(output, "last_hidden_state", None)
    return output[0] if found is None and isinstance(output, tuple) else output if found is None else found


def through_doors(reward: RewardModel, own: Any, folder: Path, texts: list[list[int]]) -> None:
    """Compare the scores of `apportion credit` and of rollouts in a run with the classifier's own."""
    result = apportion_text(reward, "", WORDS, text_methods([("sparse", {})]))
    close(
        torch.tensor(result.score),
        torch.tensor(tiny_models.own_score(own, reward.tokenizer(WORDS)["input_ids"])),
        "the score of `credit`",
    )
    judge = load_reward(str(folder), device="cpu", policy=PolicyText(tiny.tokenizer()))
    batch = tiny_runs.rollouts_of(*split(texts))
    found = reward_evidence(judge, batch, frozenset({"scores"}))["scores"]
    tokenizer = tokenizer_for(own.config)
    plain = [tokenizer.decode(ids, skip_special_tokens=True) for ids in texts]
    whole = texts if judge.text is None else [tokenizer(text)["input_ids"] for text in plain]
    close(found, torch.tensor([tiny_models.own_score(own, ids) for ids in whole]), "the scores of rollouts")


def split(texts: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts of one token, and the rest as responses."""
    return [list(t[:1]) for t in texts], [list(t[1:]) for t in texts]


def attention(reward: RewardModel, own: Any, place: str, ids: list[int]) -> str:
    """Compare the row of attention at the scored position with the eager model's own, or return the refusal."""
    batch = tiny_runs.rollouts_of([ids[:1]], [ids[1:]])
    try:
        row = reward_evidence(reward, batch, frozenset({"scores", "reward_attention"}))["reward_attention"][0]
    except ModelError as error:
        return refusal(error)
    with torch.no_grad():
        given = torch.tensor([ids])
        out = own(input_ids=given, attention_mask=torch.ones_like(given), output_attentions=True)
    if not out.attentions or out.attentions[-1] is None:
        raise Off("a row of attention is given, and the model's own is not known")
    at = {"first": 0, "last": len(ids) - 1}[place]
    close(row, out.attentions[-1][0, :, at].mean(dim=0)[1:], "the row of attention")
    return "right"


def trained(folder: Path) -> None:
    """Load the classifier with a new head, as `apportion reward` does: a model, or a refusal."""
    try:
        load_classifier("model", str(folder), torch.float32, torch.device("cpu"), new_head=2)
    except ModelError as error:
        refusal(error)


def causal(name: str, folder: Path) -> Row:
    """Sweep one family of policies; raises as `classifier` does."""
    auto = built(name, "causal", folder, is_decoder=True, causal=True)
    options: dict[str, Any] = {"max_length": 64, "dtype": "float32", "device": "cpu", "stop": "eos"}
    if load_settings("policy", str(folder)).model_type in families.REFUSED:
        return Row(name, refused_before_loading(folder, options))
    policy = load_policy(str(folder), lora=LoraConfig(rank=0), **options)
    batch = tiny_runs.sampled(policy, PROMPTS, max_new_tokens=6, samples_per_prompt=2)
    found = decoding(policy, policy.model)
    words = "its cache" if found.steps is StepModel else "the whole text each time"
    own = auto.from_pretrained(folder).eval()
    close_logprobs(own, policy, batch, batch.logprobs, "sampled")
    policy.model.requires_grad_(True)
    logprobs = policy.forward(batch, values=False).logprobs
    close_logprobs(own, policy, batch, logprobs, "the trainer's")
    (-logprobs.sum()).backward()
    if not all(torch.isfinite(p.grad).all() for p in policy.model.parameters() if p.grad is not None):
        raise Off("a gradient is not finite")
    tiny_runs.stir(policy, 0.05)
    saved(policy, folder, folder / "whole", batch)
    return Row(name, words, "right", adapters(folder, batch, options), "right")


def refused_before_loading(folder: Path, options: dict[str, Any]) -> str:
    """Return the refusal of a family by its name alone; the trial, which it spares the user, refuses it too."""

    def run() -> None:
        policy = load_policy(str(folder), lora=LoraConfig(rank=0), **options)
        batch = tiny_runs.sampled(policy, PROMPTS, max_new_tokens=6, samples_per_prompt=2)
        policy.model.requires_grad_(True)
        policy.forward(batch, values=False).logprobs.sum().backward()

    with patch.dict(families.REFUSED, clear=True):
        if error_of(run, (ModelError, AssertionError)) is None:  # the second is Reformer's, of its backward pass
            raise Off("it is refused by its name, and can be sampled from and trained")
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"no weights")
    error = error_of(run, (ModelError,))
    if not isinstance(error, ModelError) or "of the family" not in str(error):
        raise Off("weights were read")
    return "refused: " + refusal(error).split(": ", 2)[-1]


def error_of(call: Callable[[], Any], kinds: tuple[type[Exception], ...]) -> Exception | None:
    """Return the error of one of `kinds` that `call` raises; None without any."""
    try:
        call()
    except kinds as error:
        return error
    return None


@torch.no_grad()
def close_logprobs(model: Any, policy: Policy, batch: Any, found: Tensor, what: str) -> None:
    """Compare log-probabilities of rollouts with those of each row alone: one forward, no cache, no padding."""
    for row in range(len(batch)):
        prompt, ids = tiny_runs.alone(batch, row)
        logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        logits[:, policy.banned] = -torch.inf
        own = logits.log_softmax(dim=-1)[torch.arange(len(ids)), ids]
        gap = float((found[row][batch.mask[row]] - own).abs().max())
        if not gap <= NATS:
            raise Off(f"{what} log-probabilities: off by {gap:.3g} nats")


def saved(policy: Policy, base: Path, target: Path, batch: Any) -> None:
    """Save the policy, load it, and compare its log-probabilities and the names of its weights with the base's."""
    expected = policy.forward(batch, values=False).logprobs.detach()
    save_policy(policy, str(base), target, {"policy": str(base)})
    again = load_causal("policy", str(target), torch.float32, torch.device("cpu"))
    made = Policy(again, policy.tokenizer, policy.banned, ends=policy.ends)
    made.shares = policy.shares  # found out by the trial before sampling
    found = made.forward(batch, values=False).logprobs
    close(found, expected, "log-probabilities of the saved policy", NATS)
    before, after = set(tiny_runs.weights(base)), set(tiny_runs.weights(target))
    if before - after:
        raise Off(f"weights that are not saved: {sorted(before - after)[:3]}")


def adapters(folder: Path, batch: Any, options: dict[str, Any]) -> str:
    """Train adapters by one backward pass and save them merged, on the default layers and on all; or the refusals."""
    answers = {}
    for targets in ("attention", "all"):
        error = error_of(lambda targets=targets: adapted(folder, batch, options, targets), (ApportionError,))
        answers[targets] = "right" if error is None else refusal(cast(ApportionError, error))
    if answers["attention"] == answers["all"] == "right":
        return "right"
    return "; ".join(f"{targets} {answer.removesuffix(f': {targets}')}" for targets, answer in answers.items())


def adapted(folder: Path, batch: Any, options: dict[str, Any], targets: str) -> None:
    """Train adapters on these layers, save them merged, and compare."""
    policy = load_policy(str(folder), lora=LoraConfig(rank=2, targets=targets), **options)
    policy.forward(batch, values=False).logprobs.sum().backward()
    if not any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.model.parameters()):
        raise Off("adapters that no gradient reaches")
    tiny_runs.stir(policy, 0.05)
    saved(policy, folder, folder / "merged", batch)
