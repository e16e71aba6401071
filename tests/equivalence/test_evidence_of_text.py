"""Prefixes, coalitions and attributions under reward models with their own tokenizer: those of the text, by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import tiny_tokenizers
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, LlamaConfig

from apportion import Rollouts, credit
from apportion.config import ScoreConfig
from apportion.evidence import Models
from apportion.evidence.attribution import attribution_evidence
from apportion.evidence.reward import reward_evidence
from apportion.evidence.scoring import score
from apportion.evidence.shapley import shapley_evidence
from apportion.evidence.text_reward import translate
from apportion.models.reward import RewardModel, load_reward
from apportion.models.text.token_spans import PolicyText
from apportion.models.text.transfer import transfer
from apportion.registry import EvidenceKey

SAID = [
    ("I rented this", " film, and it was a great story"),
    ("A lovely", " picture"),
    ("Boring", " to the end, I say!"),
]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PREFIXES = frozenset({"prefix_scores", "prompt_score"})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_runs.world(tmp_path_factory.mktemp("world"))
    encoder = BertConfig(**SIZES, vocab_size=210, pad_token_id=0, initializer_range=0.4, num_labels=2)
    decoder = LlamaConfig(
        **SIZES, vocab_size=400, pad_token_id=0, bos_token_id=None, initializer_range=0.3, num_labels=1
    )
    models = {"encoder": (encoder, tiny_tokenizers.wordpiece()), "other": (decoder, tiny_tokenizers.byte_fallback())}
    for name, (config, tokenizer) in models.items():
        torch.manual_seed(3)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def judge(folder: Path, name: str) -> RewardModel:
    found = load_reward(str(folder / name), device="cpu", policy=PolicyText(tiny.tokenizer()))
    assert found.text is not None
    return found


def batch(extra: int = 0) -> Rollouts:
    ids = [[tiny.tokenizer()(text, add_special_tokens=False)["input_ids"] for text in pair] for pair in SAID]
    return tiny_runs.rollouts_of([p for p, _ in ids], [[*r, tiny_runs.EOS] for _, r in ids], extra=extra)


@cache
def loaded(folder: Path) -> tuple[Any, Any]:
    """Return (tokenizer, classifier) of a folder, without our library."""
    return AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()


@torch.no_grad()
def by_hand(folder: Path, prompt: list[int], response: list[int]) -> float:
    """Return R of the text that the policy's ids stand for, EOS left out, without our library."""
    text = tiny.tokenizer().decode([i for i in prompt + response if i != tiny_runs.EOS])
    tokenizer, model = loaded(folder)
    logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
    return float(logits[1] - logits[0] if len(logits) == 2 else logits[0])


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("name", ["encoder", "other"])
def test_prefixes_are_texts(world: Path, name: str, extra: int) -> None:
    rollouts, reward = batch(extra), judge(world, name)
    found = reward_evidence(reward, rollouts, PREFIXES | {"scores", "reward_attention"})
    assert set(found) == PREFIXES | {"scores", "reward_attention"}
    for row in range(len(rollouts)):
        prompt, response = tiny_runs.alone(rollouts, row)
        assert float(found["prompt_score"][row]) == pytest.approx(by_hand(world / name, prompt, []), rel=1e-5, abs=1e-5)
        for t in range(len(response)):
            expected = by_hand(world / name, prompt, response[: t + 1])
            assert float(found["prefix_scores"][row, t]) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert float(found["prefix_scores"][row, len(response) - 1]) == pytest.approx(
            float(found["scores"][row]), rel=1e-5, abs=1e-5
        )
        assert (found["prefix_scores"][row, len(response) :] == 0).all()


@pytest.mark.parametrize("name", ["encoder", "other"])
def test_coalitions_are_texts(world: Path, name: str) -> None:
    rollouts, reward = batch(), judge(world, name)
    models = Models(tiny_runs.policy(world), reward)
    key = EvidenceKey("shapley_values", spans=8, budget=64, seed=0)
    found = shapley_evidence(models, rollouts, frozenset({key}))[key]
    prompt, response = tiny_runs.alone(rollouts, 0)
    spans = [response[i : i + 8] for i in range(0, len(response), 8)]
    assert 2 <= len(spans) <= 5
    orders = list(permutations(range(len(spans))))
    values = [0.0] * len(spans)
    worth = {}
    for order in orders:
        for k, span in enumerate(order):
            both = []
            for inside in (frozenset(order[:k]), frozenset(order[: k + 1])):
                if inside not in worth:
                    worth[inside] = by_hand(world / name, prompt, [t for i in sorted(inside) for t in spans[i]])
                both.append(worth[inside])
            values[span] += (both[1] - both[0]) / len(orders)
    each = [v / len(s) for v, s in zip(values, spans, strict=True) for _ in s]
    torch.testing.assert_close(found[0, : len(each)], torch.tensor(each), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["encoder", "other"])
def test_attributions_are_carried_over_by_characters(world: Path, name: str) -> None:
    rollouts, reward = batch(), judge(world, name)
    translation = translate(reward, rollouts)
    own = attribution_evidence(replace(reward, text=None), translation.rollouts)["reward_attribution"]
    expected = transfer(own, translation.source, translation.target)
    found = attribution_evidence(reward, rollouts)["reward_attribution"]
    torch.testing.assert_close(found, expected)
    assert (found < 0).any() and (found > 0).any() and (found[~rollouts.mask] == 0).all()


@pytest.mark.parametrize("method", ["prefix_difference", "attribution", "shapley"])
def test_the_credits_keep_the_score(world: Path, method: str) -> None:
    made = credit.shapley(spans=4, budget=12) if method == "shapley" else credit.find(method)()
    scored = score(
        Models(tiny_runs.policy(world), judge(world, "encoder")), batch(2), made.needs, ScoreConfig(micro_batch=2)
    )
    rewards, _ = credit.apply(made, scored)
    torch.testing.assert_close(rewards.sum(dim=1), scored.scores, rtol=1e-5, atol=1e-5)
    assert (rewards != 0).sum() > len(scored), "the score lies on the last tokens alone"
