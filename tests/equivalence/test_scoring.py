"""Scoring on tiny real models: scores and attention whatever the padding, refusals by number, and forwards counted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_models
import tiny_runs
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForSequenceClassification

from apportion.config import LoraConfig, ScoreConfig
from apportion.errors import ConfigError, ModelError, ScoreError
from apportion.evidence import PRODUCERS, Models
from apportion.evidence.reward import reward_evidence
from apportion.evidence.scoring import score
from apportion.models.lora import add_adapter
from apportion.models.reward import RewardModel, adjust
from apportion.stages.rl.train import train

BOTH = frozenset({"scores", "reward_attention"})
RESPONSES = [[50, 60, 70, 80, 90], [33, 1], [44], [21, 22, 23, 24]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_runs.world(tmp_path_factory.mktemp("world"))
    tiny.save_reward(folder / "one-label", seed=5, labels=1)
    return folder


@torch.no_grad()
def by_hand(folder: Path, prompt: list[int], response: list[int]) -> tuple[float, torch.Tensor]:
    """Return (R, head-mean attention of the last token over the response) from eager attention, head by head."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    out = model(torch.tensor([prompt + response]), output_attentions=True)
    heads = [out.attentions[-1][0, h, -1, len(prompt) :] for h in range(4)]
    logits = out.logits[0]
    return float(logits[-1] - logits[0] if len(logits) == 2 else logits[0]), sum(heads) / 4


@pytest.mark.parametrize("name", ["reward", "one-label"])
@pytest.mark.parametrize("extra", [0, 4])
def test_scores_and_attention_equal_eager_ones_of_each_row_alone(world: Path, name: str, extra: int) -> None:
    batch = tiny_runs.rollouts_of(tiny_runs.prompts(4), RESPONSES, extra=extra)
    found = reward_evidence(tiny_runs.judge(world, name), batch, BOTH)
    for row, response in enumerate(RESPONSES):
        expected, attention = by_hand(world / name, *tiny_runs.alone(batch, row))
        assert abs(float(found["scores"][row]) - expected) < 1e-5
        n = len(response)
        torch.testing.assert_close(found["reward_attention"][row, :n], attention, rtol=0, atol=1e-5)
        assert (found["reward_attention"][row, n:] == 0).all()
    assert found["scores"].std() > 0.1
    without = reward_evidence(tiny_runs.judge(world, name), batch, frozenset({"scores"}))
    assert torch.equal(without["scores"], found["scores"]) and set(without) == {"scores"}


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "opt", "mistral (window 4)"])
def test_padding_changes_no_score_on_other_architectures(name: str) -> None:
    """Left, right, both and none: the same score and the same row as the sequence alone."""
    reward = RewardModel(tiny_models.build(name, labels=2), None)
    ids, real = [7, 8, 9, 10, 11, 12], torch.ones(6, dtype=torch.bool)
    alone, row, at = reward.score(torch.tensor([ids]), real[None], attention=True)
    assert at.tolist() == [5]
    for left, right in ((3, 0), (0, 3), (2, 4)):
        padded = torch.tensor([[0] * left + ids + [0] * right])
        mask = torch.tensor([[False] * left + [True] * 6 + [False] * right])
        scores, wide, at = reward.score(padded, mask, attention=True)
        assert at.tolist() == [left + 5]
        torch.testing.assert_close(scores, alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(wide[:, left : left + 6], row, rtol=0, atol=1e-5)
        assert (wide[~mask] == 0).all()


@pytest.mark.parametrize("micro", [1, 3, 32])
def test_micro_batches_change_no_score_and_no_evidence(world: Path, micro: int) -> None:
    models = tiny_runs.models(world)
    batch = tiny_runs.sampled(models.policy, tiny_runs.prompts(7))
    needs = {name for producer in PRODUCERS.values() if not producer.requires for name in producer.provides}
    needs -= {"vine_values", "vine_calls"}  # sampled afresh in each micro-batch
    if find_spec("spacy") is None:  # phrases need an extra
        needs -= {"phrase_boundaries", "phrase_fallback"}
    whole = score(models, batch, needs, ScoreConfig(micro_batch=7))
    parts = score(models, batch, needs, ScoreConfig(micro_batch=micro))
    assert set(parts.evidence) == set(whole.evidence) == (needs - {"scores", "old_logprobs"}) | {"raw_scores"}
    for name in whole.evidence:
        torch.testing.assert_close(parts.evidence[name], whole.evidence[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(parts.scores, whole.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts.old_logprobs, whole.old_logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts.old_logprobs, batch.logprobs, rtol=0, atol=1e-5)


def test_a_response_with_the_reward_models_pad_is_refused_by_its_number(world: Path) -> None:
    """Its pooled position would move to the token before; in a later micro-batch, so that numbers are the batch's."""
    models = tiny_runs.models(world)
    batch = tiny_runs.sampled(models.policy, tiny_runs.prompts(5), max_new_tokens=4)
    ids = batch.response_ids.clone()
    ids[3, -1] = models.reward.model.config.pad_token_id
    with pytest.raises(ScoreError, match=r"pooled position of rollout 3: got 6; expected 7, the last token"):
        score(models, replace(batch, response_ids=ids), (), ScoreConfig(micro_batch=2))


def test_a_score_that_is_not_a_number_is_refused_by_its_number(world: Path) -> None:
    models = tiny_runs.models(world)
    batch = tiny_runs.sampled(models.policy, tiny_runs.prompts(5))
    ids = batch.response_ids.clamp_max(398)
    ids[4, 2] = 399  # nobody else's token
    batch = replace(batch, response_ids=ids, prompt_ids=batch.prompt_ids.clamp_max(398))
    with torch.no_grad():
        models.reward.model.model.embed_tokens.weight[399] = torch.nan
    with pytest.raises(ScoreError, match="score of rollout 4: got nan; expected a finite number"):
        score(models, batch, (), ScoreConfig(micro_batch=3))


def test_scores_are_centred_scaled_and_clipped_a_sequence_at_a_time(world: Path) -> None:
    reward = replace(tiny_runs.judge(world), mean=0.5, sd=2.0)
    raw = torch.tensor([0.5, 2.5, -7.5, 40.5])
    table = {
        (False, False, None): [0.5, 2.5, -7.5, 40.5],
        (True, False, None): [0.0, 2.0, -8.0, 40.0],
        (False, True, None): [0.25, 1.25, -3.75, 20.25],
        (True, True, None): [0.0, 1.0, -4.0, 20.0],
        (True, True, 2.5): [0.0, 1.0, -2.5, 2.5],
    }
    for (center, scale, clip), expected in table.items():
        assert adjust(raw, reward, ScoreConfig(center=center, scale=scale, clip=clip)).tolist() == expected
    models = Models(tiny_runs.policy(world), reward)
    batch = tiny_runs.sampled(models.policy, tiny_runs.prompts(4))
    found = score(models, batch, (), ScoreConfig(center=True, scale=True, clip=0.2))
    torch.testing.assert_close(found.scores, ((found.evidence["raw_scores"] - 0.5) / 2.0).clamp(-0.2, 0.2))
    assert (found.scores.abs() <= 0.2).all() and (found.evidence["raw_scores"].abs() > 0.9).any()


@pytest.mark.parametrize(("base", "head"), [("reward", None), ("policy", "score")])
def test_a_reward_model_may_be_an_adapter(world: Path, tmp_path: Path, base: str, head: str | None) -> None:
    """Over a reward model, or over a language model with a trained head; without any trained head it is refused."""
    model = AutoModelForSequenceClassification.from_pretrained(world / base, num_labels=2).eval()
    adapted = add_adapter(model, LoraConfig(rank=2), head=head).eval()
    with torch.no_grad():
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[50, 60, 70, 80]])
    trained, loaded = RewardModel(adapted, None), tiny_runs.judge(tmp_path, "adapter")
    found = (model.score(ids, ids > 0, attention=True) for model in (trained, loaded))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    if head:
        bare = AutoModelForSequenceClassification.from_pretrained(world / base, num_labels=2)
        add_adapter(bare, LoraConfig(rank=2)).save_pretrained(tmp_path / "adapter")
        with pytest.raises(ModelError, match=r"score\.weight.*weights for every layer"):
            tiny_runs.judge(tmp_path, "adapter")


def test_evidence_that_no_pass_gives_is_refused_by_name(world: Path) -> None:
    models = tiny_runs.models(world)
    batch = tiny_runs.sampled(models.policy, tiny_runs.prompts(2))
    with pytest.raises(ConfigError, match="'reward_attention'"):
        score(models, batch, {"reward_atention"}, ScoreConfig())


def what(module: Any, kwargs: dict[str, Any]) -> str:
    """Return which use of which model a forward is: generation, update, or scoring by policy, reference, reward."""
    if "Classification" in type(module).__name__:
        return "reward"
    if kwargs.get("use_cache"):
        return "generation"
    if torch.is_grad_enabled():
        return "update"
    layers = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
    if layers:
        return "reference" if layers[0].disable_adapters else "policy"
    trained = any(p.requires_grad for p in module.parameters())
    return "policy" if trained else "reference"


@contextmanager
def counted() -> Iterator[dict[str, Counter[str]]]:
    """Count rows fed to each model, by its use, of every forward in this process (a global hook of PyTorch)."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    begun: list[bool] = []

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("input_ids") is not None and kwargs["input_ids"].shape == (1, 2):
            return  # loading tries the output layer out on two tokens
        if type(module).__name__ in ("LlamaForCausalLM", "LlamaForSequenceClassification"):
            use = what(module, kwargs)
            if use == "generation" and not begun:  # loading tries both models out on a few tokens
                begun.append(True)
                seen.clear()
                seen["rows"]["trunk"] += len(kwargs["input_ids"])  # of this forward, counted just before
            seen["rows"][use] += len(kwargs["input_ids"])
            seen["forwards"][use] += 1
            seen["tokens"][use] += int(kwargs["attention_mask"].sum()) if use != "generation" else 0
        if type(module).__name__ == "LlamaModel":
            seen["rows"]["trunk"] += len(args[0] if args else kwargs["input_ids"])

    handle = register_module_forward_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


CREDITS = ("attention", "sparse", "policy_attention", "prefix_difference")
RUNS = [(rank, value_model, credit) for credit in CREDITS for value_model in ("shared", "separate") for rank in (4, 0)]


@pytest.mark.parametrize(
    ("rank", "value_model", "credit"),
    # every credit, and every rank with every value model
    [run if i in (0, 7, 9, 14) else pytest.param(*run, marks=pytest.mark.long) for i, run in enumerate(RUNS)],
)
def test_each_model_reads_each_token_once_a_batch(
    world: Path, tmp_path: Path, rank: int, value_model: str, credit: str
) -> None:
    """A real run of two batches of 6 in micro-batches of 4 (scoring) and 3 (update), every comparison logged."""
    changes = {"lora.rank": rank, "ppo.value_model": value_model, "credit": credit, "scores.micro_batch": 4}
    config = tiny_runs.config(world, tmp_path / "run", **changes)
    assert set(config.compare) == {"sparse", "uniform", "attention", "policy_attention"}
    steps: list[dict[str, dict[str, int]]] = []
    with counted() as seen:

        def on_step(step: int, total: int, metrics: dict[str, float]) -> None:
            steps.append({kind: dict(counts) for kind, counts in seen.items()})
            seen.clear()

        run = train(config, on_step=on_step)
    assert len(steps) == 2
    records = tiny_runs.read_lines(run.path / "rollouts.jsonl")
    assert {"methods", "alpha", "kl", "value"} <= set(records[0]) and len(records[0]["methods"]) == 4
    for step in steps:
        rows, forwards = step["rows"], step["forwards"]
        assert rows["policy"] == rows["reference"] == rows["reward"] == 6
        assert forwards["policy"] == forwards["reference"] == forwards["reward"] == 2  # micro-batches of 4 and 2
        assert step["tokens"]["policy"] == step["tokens"]["reference"] == step["tokens"]["reward"]
        assert rows["generation"] == 6 and forwards["generation"] == 1  # prompts; a Llama's steps are written out
        assert rows["update"] == 6 * config.ppo.epochs
        models = sum(rows[use] for use in ("policy", "reference", "reward", "generation", "update"))
        values = 6 + 6 * config.ppo.epochs if value_model == "separate" else 0
        assert rows["trunk"] == models + values


@pytest.mark.parametrize(("rank", "value_model"), [(4, "shared"), (0, "separate")])
@pytest.mark.parametrize("compare", ["[]", "[policy_attention]"])  # with the forward's attention captured and without
def test_where_a_mini_batch_is_the_batch_the_update_begins_with_the_forward_of_scoring(
    world: Path, tmp_path: Path, rank: int, value_model: str, compare: str
) -> None:
    """In float32, beside the same run whose scoring is in two micro-batches, and whose update computes it again."""
    changes = {"lora.rank": rank, "ppo.value_model": value_model, "ppo.mini_batch": 6, "ppo.micro_batch": 6}
    runs = []
    for name, scored in (("kept", 8), ("again", 4)):
        config = tiny_runs.config(
            world, tmp_path / name, **changes, **{"scores.micro_batch": scored, "compare": compare, "steps": 3}
        )
        with counted() as seen:
            run = train(config)
        weights = load_file(run.path / "final" / "model.safetensors")
        runs.append((dict(seen["rows"]), tiny_runs.read_lines(run.path / "metrics.jsonl"), weights))
    (kept, kept_metrics, kept_weights), (again, metrics, weights) = runs
    assert kept["update"] == again["update"] == 3 * 6 * 2  # two epochs; what is kept is computed with gradients
    assert "policy" not in kept and again["policy"] == 3 * 6
    assert kept["reference"] == again["reference"] == 3 * 6
    for one, other in zip(kept_metrics, metrics, strict=True):
        for key in ("loss/policy", "loss/value", "policy/grad_norm", "objective/kl", "objective/entropy"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6)
    start = load_file(world / "policy" / "model.safetensors")
    assert any((kept_weights[key] - start[key]).abs().max() > 1e-3 for key in start)  # something was learned
    for key, weight in weights.items():
        torch.testing.assert_close(kept_weights[key], weight, rtol=0, atol=2e-5)
