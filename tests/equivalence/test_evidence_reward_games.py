"""Attribution against finite differences, Shapley values against brute force, on tiny real reward models."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import tiny
import tiny_models
import tiny_runs
import torch

from apportion import credit, segments
from apportion.config import ScoreConfig
from apportion.errors import ConfigError, ScoreError
from apportion.evidence import PRODUCERS, Models
from apportion.evidence.attribution import attribution_evidence
from apportion.evidence.scoring import score
from apportion.evidence.shapley import shapley_evidence, split_spans
from apportion.models.reward import RewardModel
from apportion.registry import EvidenceKey

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
RESPONSES = [[50, 60, 70, 80, 90], [33, 2], [44]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt-neox", "bert"])
def test_attribution_is_the_slope_from_the_pad_embedding(name: str, extra: int) -> None:
    """Central differences in float64 along (e_t − e_null), one token at a time, in the row on its own.

    (Models with RMSNorm compute it in float32 whatever their weights, too coarse for differences.)
    """
    model = tiny_models.build(name, labels=2)
    extra = 0 if name == "bert" else extra
    prompts = [[5, 6, 7]] * 3 if name == "bert" else PROMPTS  # encoders take no padding on the left
    batch = tiny_runs.rollouts_of(prompts, RESPONSES, extra=extra)
    seen: list[int] = []
    reward = RewardModel(model, None)
    assert reward.reading.batched  # tried out before forwards are counted
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    found = attribution_evidence(reward, batch)["reward_attribution"]
    handle.remove()
    assert len(seen) == PRODUCERS["attribution"].forwards == PRODUCERS["attribution"].backwards == 1
    assert all(p.grad is None for p in model.parameters()), "weights got a gradient"
    assert not model.get_input_embeddings()._forward_hooks
    model = model.double()
    for row, response in enumerate(RESPONSES):
        ids = torch.tensor([prompts[row] + response])
        for t in range(len(response)):
            expected = slope(model, ids, len(prompts[row]) + t)
            assert float(found[row, t]) == pytest.approx(expected, abs=1e-4, rel=1e-4)
        assert (found[row, len(response) :] == 0).all()
    assert (found < 0).any() and (found > 0).any()


@torch.no_grad()
def slope(model: torch.nn.Module, ids: torch.Tensor, position: int) -> float:
    layer, step = model.get_input_embeddings(), 1e-5
    null = layer(torch.tensor([0]))[0]

    def value(change: float) -> float:
        def moved(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[0, position] += change * (output[0, position] - null)
            return output

        handle = layer.register_forward_hook(moved)
        logits = model(input_ids=ids).logits[0]
        handle.remove()
        return float(logits[1] - logits[0])

    return (value(step) - value(-step)) / (2 * step)


def test_an_attribution_that_is_not_a_number_is_named(world: Path) -> None:
    reward = tiny_runs.judge(world)
    batch = tiny_runs.rollouts_of(PROMPTS, RESPONSES)
    with torch.no_grad():
        reward.model.model.embed_tokens.weight[33] = torch.inf
    with pytest.raises(ScoreError, match="of rollout 1: got nan"):
        attribution_evidence(reward, batch)


def key(part: str, **settings: object) -> str:
    return EvidenceKey(f"shapley_{part}", **{"spans": 2, "budget": 64, "seed": 0} | settings)


def cut_out(reward: RewardModel, prompt: list[int], kept: list[int]) -> float:
    ids = torch.tensor([prompt + kept])
    return float(reward.score(ids, torch.ones_like(ids, dtype=torch.bool))[0])


def by_hand(reward: RewardModel, prompt: list[int], spans: list[list[int]]) -> list[float]:
    """Return each span's mean gain over all orders, each coalition read as a text of its own."""
    total = [0.0] * len(spans)
    orders = list(permutations(range(len(spans))))
    for order in orders:
        for k, span in enumerate(order):
            without = [t for i in sorted(order[:k]) for t in spans[i]]
            with_it = [t for i in sorted(order[: k + 1]) for t in spans[i]]
            total[span] += cut_out(reward, prompt, with_it) - cut_out(reward, prompt, without)
    return [t / len(orders) for t in total]


@pytest.mark.parametrize("extra", [0, 3])
def test_shapley_values_are_those_of_texts_with_spans_cut_out(world: Path, extra: int) -> None:
    models = tiny_runs.models(world)
    batch = tiny_runs.rollouts_of(PROMPTS, RESPONSES, extra=extra)
    parts = ("values", "empty", "error", "calls", "joined")
    found = shapley_evidence(models, batch, frozenset(key(p) for p in parts))
    assert set(found) == {key(p) for p in parts}
    for row, response in enumerate(RESPONSES):
        spans = [response[i : i + 2] for i in range(0, len(response), 2)]
        values = by_hand(models.reward, PROMPTS[row], spans)
        each = [v / len(s) for v, s in zip(values, spans, strict=True) for _ in s]
        torch.testing.assert_close(found[key("values")][row, : len(each)], torch.tensor(each), rtol=0, atol=1e-5)
        assert (found[key("values")][row, len(each) :] == 0).all()
        assert float(found[key("empty")][row]) == pytest.approx(cut_out(models.reward, PROMPTS[row], []), abs=1e-5)
        assert found[key("calls")][row] == 2 ** len(spans)
    assert (found[key("error")] == 0).all() and (found[key("joined")] == 0).all()


def test_what_comes_later_changes_an_earlier_tokens_value(world: Path) -> None:
    """Why neither credit is causal."""
    models = tiny_runs.models(world)
    batch = tiny_runs.rollouts_of([[5, 6]] * 2, [[50, 60, 70, 80], [50, 60, 71, 33]])
    values = shapley_evidence(models, batch, frozenset({key("values")}))[key("values")]
    effects = attribution_evidence(models.reward, batch)["reward_attribution"]
    for found in (values, effects):
        assert (found[0, :2] - found[1, :2]).abs().max() > 1e-3


def test_the_credit_keeps_the_score_and_counts_its_readings(world: Path) -> None:
    """Through `score`, with a budget so small that orders are drawn and spans joined; micro-batches change nothing."""
    models = tiny_runs.models(world)
    batch = tiny_runs.rollouts_of([[5, 6]] * 2, [[*range(40, 60)], [70, 71, 72]])
    method = credit.shapley(spans=1, budget=20)
    rows: list[int] = []
    models.reward.model.register_forward_pre_hook(
        lambda m, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    scored = score(models, batch, method.needs, ScoreConfig())
    calls, joined = (scored.evidence[key(p, spans=1, budget=20)] for p in ("calls", "joined"))
    assert joined.tolist() == [15, 0] and calls[1] == 8 and 10 < calls[0] <= 20
    assert sum(rows) == 2 + int(calls.sum()), "two texts are scored, and the games read what they say"
    rewards, _ = credit.apply(method, scored)
    torch.testing.assert_close(rewards.sum(dim=1), scored.scores, rtol=0, atol=1e-5)
    errors = scored.evidence[key("error", spans=1, budget=20)]
    assert errors[0] > 0 and errors[1] == 0
    totals = method.stats(scored, rewards, rewards)
    assert totals["credit/shapley_calls"][0] == calls.sum() and totals["credit/shapley_joined"][0] == 15
    again = score(models, batch, method.needs, ScoreConfig(micro_batch=1))
    torch.testing.assert_close(credit.apply(method, again)[0], rewards, rtol=0, atol=1e-5)


def test_values_are_scaled_with_the_scores(world: Path) -> None:
    models = tiny_runs.models(world)
    models.reward.mean, models.reward.sd = 0.4, 2.0
    batch = tiny_runs.rollouts_of(PROMPTS, RESPONSES)
    method = credit.shapley(spans=2)
    plain = score(models, batch, method.needs, ScoreConfig())
    scaled = score(models, batch, method.needs, ScoreConfig(center=True, scale=True))
    torch.testing.assert_close(scaled.evidence[key("values")], plain.evidence[key("values")] / 2)
    torch.testing.assert_close(scaled.evidence[key("empty")], (plain.evidence[key("empty")] - 0.4) / 2)
    assert torch.equal(scaled.evidence[key("calls")], plain.evidence[key("calls")])
    expected = scaled.evidence[key("values")][0].clone()
    expected[0] += scaled.evidence[key("empty")][0]
    torch.testing.assert_close(credit.apply(method, scaled)[0][0], expected, rtol=0, atol=1e-5)


def test_spans(world: Path) -> None:
    models = tiny_runs.models(world)
    words = tiny.tokenizer()("A film. Bad! And so on", add_special_tokens=False)["input_ids"]
    texts = [models.policy.tokenizer.decode([i]) for i in words]
    batch = tiny_runs.rollouts_of([[5]], [words], extra=2)
    found = split_spans(models, batch, 0, "sentences").tolist()
    ended, expected = 0, []
    for text in texts:
        expected.append(ended)
        ended += text in (".", "!")
    assert found == [*expected, -1, -1] and max(found) == 2
    holes = batch.mask.clone()
    holes[0, 1] = False
    object.__setattr__(batch, "mask", holes)
    assert split_spans(models, batch, 0, 2).tolist()[:4] == [0, -1, 0, 1]
    with pytest.raises(ConfigError, match="shapley.spans: got 'segments'"):
        split_spans(models, batch, 0, "segments")
    known = Models(models.policy, models.reward, segments.tokens())
    assert torch.equal(split_spans(known, batch, 0, "segments"), segments.tokens()(batch)[0])


def test_a_reading_that_is_not_a_number_is_named(world: Path) -> None:
    """Token 33 is the second rollout's; it stands in the second micro-batch, so that the number is the batch's."""
    models = tiny_runs.models(world)
    batch = tiny_runs.rollouts_of(PROMPTS, RESPONSES)
    with torch.no_grad():
        models.reward.model.model.embed_tokens.weight[33] = torch.nan
    with pytest.raises(ScoreError, match="score of rollout 1: got nan"):
        shapley_evidence(models, batch, frozenset({key("values")}))
    with pytest.raises(ScoreError, match="prompt of rollout 1: got 'no tokens'"):
        shapley_evidence(models, tiny_runs.rollouts_of([[5], []], RESPONSES[:2]), frozenset({key("values")}))
