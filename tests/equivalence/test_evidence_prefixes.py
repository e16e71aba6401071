"""Prefix scores: all out of one forward of a decoder, row by row of an encoder, equal to each prefix scored alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import tiny_runs
import torch
from torch import Tensor, nn

from apportion import Rollouts, credit
from apportion.config import ScoreConfig
from apportion.errors import ModelError, ScoreError
from apportion.evidence import Models
from apportion.evidence.ablated import compact
from apportion.evidence.prefix import capture_head_outputs, prefix_evidence
from apportion.evidence.reward import reward_evidence
from apportion.evidence.scoring import score
from apportion.models.reward import RewardModel

PREFIXES = frozenset({"prefix_scores", "prompt_score"})
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
RESPONSES = [[50, 60, 70, 80, 90], [33, 2], [44]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


def forwards(model: nn.Module) -> list[int]:
    """Return a list that gets the rows of each forward of `model` from now on."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    return seen


def alone(reward: RewardModel, tokens: list[int]) -> float:
    ids = torch.tensor([tokens])
    return float(reward.score(ids, torch.ones_like(ids, dtype=torch.bool))[0])


def each_alone(reward: RewardModel, batch: Rollouts) -> tuple[Tensor, Tensor]:
    """Return (prefix scores (B,T), prompt scores (B,)) with every prefix given to the model as a text of its own."""
    found = torch.zeros(batch.mask.shape)
    prompts = [batch.prompt_ids[i][batch.prompt_mask[i]].tolist() for i in range(len(batch))]
    for row, prompt in enumerate(prompts):
        for t in batch.mask[row].nonzero()[:, 0].tolist():
            response = batch.response_ids[row, : t + 1][batch.valid[row, : t + 1]].tolist()
            found[row, t] = alone(reward, prompt + response)
    return found, torch.tensor([alone(reward, p) for p in prompts])


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "opt", "mistral (window 4)", "qwen3 (q/k norm)"])
def test_a_decoder_gives_every_prefix_in_the_scoring_forward(name: str, extra: int, labels: int) -> None:
    reward = RewardModel(tiny_models.build(name, labels=labels), None)
    batch = tiny_runs.rollouts_of(PROMPTS, RESPONSES, extra=extra)
    expected, prompts = each_alone(reward, batch)
    seen = forwards(reward.model)
    found = reward_evidence(reward, batch, PREFIXES | {"scores", "reward_attention"})
    assert seen == [3], "prefixes must cost no forward of their own"
    torch.testing.assert_close(found["prefix_scores"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["prompt_score"], prompts, rtol=0, atol=1e-5)
    assert (found["prefix_scores"][~batch.mask] == 0).all() and expected.std() > 0.05
    last = found["prefix_scores"][range(3), [4, 1, 0]]
    assert torch.equal(last, found["scores"]), "the last prefix is the whole text, bit for bit"
    without = reward_evidence(reward, batch, frozenset({"scores"}))
    assert torch.equal(without["scores"], found["scores"]) and set(without) == {"scores"}


def test_tokens_of_a_tool_are_read_and_have_no_prefix_of_their_own() -> None:
    reward = RewardModel(tiny_models.build("gpt2"), None)
    batch = tiny_runs.rollouts_of(PROMPTS, RESPONSES)
    holes = batch.mask.clone()
    holes[0, 1:3] = False
    batch = replace(batch, mask=holes)  # `valid` still has them
    found = reward_evidence(reward, batch, PREFIXES)
    torch.testing.assert_close(found["prefix_scores"], each_alone(reward, batch)[0], rtol=0, atol=1e-5)
    assert (found["prefix_scores"][0, 1:3] == 0).all()


@pytest.mark.parametrize("extra", [0, 2])
def test_an_encoder_reads_each_prefix_as_a_row(extra: int) -> None:
    reward = RewardModel(tiny_models.build("bert"), None)
    batch = tiny_runs.rollouts_of(PROMPTS, RESPONSES, extra=extra)
    expected, prompts = each_alone(reward, batch)
    seen = forwards(reward.model)
    found = prefix_evidence(reward, batch, [], PREFIXES)
    assert sum(seen) == 3 + 8 and len(seen) == 1
    torch.testing.assert_close(found["prefix_scores"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["prompt_score"], prompts, rtol=0, atol=1e-5)
    seen.clear()
    fewer = prefix_evidence(reward, batch, [], frozenset({"prefix_scores"}))
    assert sum(seen) == 8 and set(fewer) == {"prefix_scores"}
    torch.testing.assert_close(fewer["prefix_scores"], found["prefix_scores"], rtol=0, atol=1e-5)


def test_compact_moves_what_is_kept_together() -> None:
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    keep = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 1]]).bool()
    left, mask = compact(ids, keep)
    assert mask.tolist() == [[True, True, False], [True] * 3, [True, False, False]]
    assert [row[m].tolist() for row, m in zip(left, mask, strict=True)] == [[2, 4], [5, 6, 7], [12]]


def test_a_prefix_that_is_not_a_number_is_named(world: Path) -> None:
    """In a later micro-batch, so that the number is the batch's; the score itself would be refused first."""
    reward = RewardModel(tiny_models.build("gpt2"), None)
    batch = tiny_runs.rollouts_of(PROMPTS, RESPONSES)
    logits = torch.zeros(3, batch.prompt_ids.shape[1] + 5, 1)
    logits[1, -5] = torch.nan
    with pytest.raises(ScoreError, match=r"prefix_scores of rollout 1, token 0: got nan"):
        prefix_evidence(reward, batch, [logits], PREFIXES)
    encoder = tiny_models.build("bert")
    with torch.no_grad():
        encoder.bert.embeddings.word_embeddings.weight[33] = torch.nan  # the second rollout's alone
    with pytest.raises(ScoreError, match="score of rollout 1: got nan"):
        prefix_evidence(RewardModel(encoder, None), batch, [], PREFIXES)


def test_an_empty_prompt_is_named_where_its_score_is_wanted() -> None:
    reward = RewardModel(tiny_models.build("gpt2"), None)
    batch = tiny_runs.rollouts_of([[5, 6], []], RESPONSES[:2])
    with pytest.raises(ScoreError, match="prompt of rollout 1: got 'no tokens'"):
        reward_evidence(reward, batch, PREFIXES)
    assert torch.isfinite(reward_evidence(reward, batch, frozenset({"prefix_scores"}))["prefix_scores"]).all()


def test_a_model_without_a_head_of_a_known_name_is_refused() -> None:
    model = tiny_models.build("gpt2")
    with pytest.raises(ModelError, match="head of GPT2Model"), capture_head_outputs(model.transformer):
        pass
    with capture_head_outputs(model) as caught, pytest.raises(ValueError, match="input_ids"):
        model()
    assert caught == [] and not model.score._forward_hooks, "any exit removes the hook"


def test_prefixes_are_put_into_the_units_of_the_score(world: Path) -> None:
    """Centred, scaled and clipped as scores are, so that the last prefix is the score and the sum of credit too."""
    models = tiny_runs.models(world)
    models = Models(models.policy, replace(models.reward, mean=0.3, sd=2.0))
    batch = tiny_runs.sampled(models.policy, tiny_runs.prompts(5))
    for clip in (None, 0.2):
        config = ScoreConfig(center=True, scale=True, clip=clip, micro_batch=2)
        found = score(models, batch, PREFIXES, config)
        last = batch.mask.shape[1] - 1 - batch.mask.flip(1).int().argmax(dim=1)
        assert torch.equal(found.evidence["prefix_scores"].gather(1, last[:, None])[:, 0], found.scores)
        rewards, _ = credit.apply(credit.prefix_difference(), found)
        torch.testing.assert_close(rewards.sum(dim=1), found.scores, rtol=0, atol=1e-5)
    assert (found.scores.abs() == 0.2).any(), "nothing was clipped"
    plain = score(models, batch, PREFIXES, ScoreConfig())
    unclipped = score(models, batch, PREFIXES, ScoreConfig(center=True, scale=True)).evidence
    torch.testing.assert_close(unclipped["prompt_score"], (plain.evidence["prompt_score"] - 0.3) / 2.0)
