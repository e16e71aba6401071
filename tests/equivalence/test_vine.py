"""Fresh rollouts from the states of a batch: their texts, how many there are, and their mean score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
import torch

from apportion import segments
from apportion.config import SamplingConfig, ScoreConfig
from apportion.errors import ConfigError
from apportion.evidence import Models
from apportion.evidence.scoring import score
from apportion.evidence.vine import state_values, vine_evidence
from apportion.registry import EvidenceKey


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


def models_of(world: Path, tokens: int = 6, stop: str = "length") -> Models:
    made = tiny_runs.models(world, **{"sampling.stop": stop})
    sampling = SamplingConfig(batch_size=6, max_new_tokens=tokens, stop=stop)
    return replace(made, segment=segments.ngrams(n=2), sampling=sampling, generator=torch.Generator().manual_seed(0))


def test_values_stand_before_each_action_and_calls_are_counted(world: Path) -> None:
    models = models_of(world)
    batch = tiny_runs.sampled(models.policy, tiny_runs.prompts(), max_new_tokens=6)
    found = vine_evidence(
        models, batch, frozenset({EvidenceKey("vine_values", samples=3), EvidenceKey("vine_calls", samples=3)})
    )
    values = found["vine_values@samples=3"]
    assert (values[:, 0::2] != 0).all() and (values[:, 1::2] == 0).all()
    assert found["vine_calls@samples=3"].tolist() == [9.0] * len(batch)


def test_a_state_with_one_token_left_has_the_mean_score_of_its_endings(world: Path) -> None:
    """The exact value: every last token tried, weighed by its probability."""
    models = models_of(world)
    batch = tiny_runs.sampled(models.policy, tiny_runs.prompts(2), max_new_tokens=6)
    starts = torch.zeros_like(batch.mask)
    starts[:, 5] = True
    samples = 400
    models.sampling.batch_size = samples
    found = state_values(models, batch, starts, samples)[:, 5]
    for row in range(len(batch)):
        prompt, response = tiny_runs.alone(batch, row)
        kept = torch.tensor([prompt + response[:5]])
        with torch.no_grad():
            logits = models.policy.allowed(models.policy.model(kept).logits[0, -1])
        weight = logits.softmax(dim=0)
        ids = torch.cat([kept.expand(400, -1), torch.arange(400)[:, None]], dim=1)[weight > 0]
        scores = models.reward.score(ids, torch.ones_like(ids, dtype=torch.bool))[0]
        exact, spread = (weight[weight > 0] * scores).sum(), scores.std()
        assert abs(float(found[row] - exact)) < 4 * float(spread) / samples**0.5


def test_each_text_is_scored_once_and_whole(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward model scores the prompt, the response so far, and a continuation no longer than the rest."""
    models = models_of(world, stop="eos")
    batch = tiny_runs.sampled(models.policy, tiny_runs.prompts(3), max_new_tokens=6, stop="eos")
    read: list[list[int]] = []
    inner = models.reward.forward

    def spy(ids: torch.Tensor, mask: torch.Tensor, readings: object) -> object:
        read.extend(row[on].tolist() for row, on in zip(ids, mask, strict=True))
        return inner(ids, mask, readings)  # type: ignore[arg-type]

    monkeypatch.setattr(models.reward, "forward", spy)
    vine_evidence(models, batch, frozenset({EvidenceKey("vine_values", samples=2)}))
    ids = segments.ngrams(n=2)(batch)
    expected = []
    for row in range(len(batch)):
        prompt, response = tiny_runs.alone(batch, row)
        for action in range(int(ids[row].max()) + 1):
            at = int((ids[row] == action).int().argmax())
            expected += [prompt + response[:at]] * 2
    assert len(read) == len(expected)
    for state in expected:
        fits = [text for text in read if text[: len(state)] == state and len(text) > len(state)]
        assert fits, state
    longest = max(len(tiny_runs.alone(batch, row)[0]) for row in range(len(batch))) + 6
    assert all(len(text) <= longest for text in read)


def test_values_are_in_the_units_of_the_scores(world: Path) -> None:
    models = replace(models_of(world), scores=ScoreConfig(clip=0.05))
    batch = tiny_runs.sampled(models.policy, tiny_runs.prompts(), max_new_tokens=4)
    scored = score(models, batch, {EvidenceKey("vine_values", samples=2)}, ScoreConfig(clip=0.05))
    assert scored.evidence["vine_values@samples=2"].abs().max() <= 0.05 + 1e-6


def test_a_run_without_segments_is_an_error(world: Path) -> None:
    batch = tiny_runs.sampled(tiny_runs.models(world).policy, tiny_runs.prompts(2))
    with pytest.raises(ConfigError, match="segment, sampling and generator"):
        vine_evidence(tiny_runs.models(world), batch, frozenset({"vine_values"}))
