"""Values that begin as the reward model: the score of every text so far, by forwards of the reward model alone."""

from __future__ import annotations

import json
from pathlib import Path

import foreign_models
import pytest
import tiny
import tiny_runs
import torch

from apportion.errors import ConfigError
from apportion.models.reward import RewardModel, load_reward
from apportion.models.text.render import embedding_count
from apportion.models.value_head import score_layer
from apportion.stages.method import build_method
from apportion.stages.rl import train
from apportion.stages.rl.learner import make_learner
from apportion.stages.rl.models import make_policy

RESPONSES = [[50, 60, 70, 80, 90], [33, tiny_runs.EOS], [tiny_runs.EOS], [21, 22, 23, tiny_runs.EOS]]
STATISTICS = {"mean": 0.7, "sd": 2.5}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


@torch.no_grad()
def prefix_scores(reward: RewardModel, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Return R of the prompt and the first t tokens of the response, (T+1,), each text in a forward of its own."""
    texts = [prompt + response[:t] for t in range(len(response) + 1)]
    return torch.stack([reward.score(torch.tensor([t]), torch.ones(1, len(t), dtype=torch.bool))[0][0] for t in texts])


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("scores", [{}, {"scores.center": True, "scores.scale": True, "scores.clip": 0.01}])
def test_values_begin_as_the_reward_of_the_text_so_far(
    world: Path, tmp_path: Path, labels: int, rank: int, scores: dict[str, object]
) -> None:
    folder = tiny.save_reward(tmp_path / "reward", labels=labels)
    (folder / "reward.json").write_text(json.dumps(STATISTICS))
    reward = load_reward(str(folder), device="cpu")
    changes = {"lora.rank": rank, "ppo.value_model": "reward", "sampling.stop": "eos"} | scores
    policy = make_policy(tiny_runs.config(world, **changes), reward)
    prompts = tiny_runs.prompts(4)
    batch = tiny_runs.rollouts_of(prompts, RESPONSES)
    with torch.no_grad():
        values, after = policy.values(batch)
    for row, (prompt, response) in enumerate(zip(prompts, RESPONSES, strict=True)):
        expected = prefix_scores(reward, prompt, response)
        if scores:  # the clip is no part of a value: it would have no gradient
            expected = (expected - STATISTICS["mean"]) / STATISTICS["sd"]
        assert torch.allclose(values[row, : len(response)], expected[:-1], atol=1e-5)
        assert torch.allclose(after[row], expected[-1], atol=1e-5)
        assert (values[row, len(response) :] == 0).all()
    assert expected.abs().max() > 0.05


@pytest.mark.parametrize("rank", [0, 4])
def test_a_pad_token_that_was_added_to_the_policy_has_no_embedding_in_the_critic(
    world: Path, tmp_path: Path, rank: int
) -> None:
    """The policy is widened for it; the reward model scores the policy's ids, and so does the critic made of it."""
    changes = {"policy": world / "ending", "pad_token": "[NEW]", "ppo.value_model": "reward", "sampling.stop": "eos"}
    config = tiny_runs.config(world, tmp_path / "run", **changes | {"lora.rank": rank, "log_rollouts": 6})
    learner = make_learner(config, build_method(config))
    reward, embeddings = learner.models.reward, embedding_count(learner.policy.model)
    assert reward.text is None and learner.policy.pad == embeddings - 1 == embedding_count(reward.model)
    _, records = tiny_runs.one_batch(learner)
    assert len({len(record["response_ids"]) for record in records}) > 1  # some are padded
    for record in records:
        expected = prefix_scores(reward, record["prompt_ids"], record["response_ids"])[:-1]
        assert record["value"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_the_critic_learns_and_the_reward_model_stays(world: Path) -> None:
    reward = tiny_runs.judge(world)
    before = {name: p.clone() for name, p in reward.model.named_parameters()}
    policy = make_policy(tiny_runs.config(world, **{"lora.rank": 0, "ppo.value_model": "reward"}), reward)
    learning = {id(p) for p in policy.trainable()}
    assert all(id(p) in learning for p in policy.value_trunk.parameters())
    tiny_runs.stir(policy)
    assert all(torch.equal(p, before[name]) for name, p in reward.model.named_parameters())


def test_the_first_logged_values_are_the_reward_models(world: Path, tmp_path: Path) -> None:
    """Through the whole stage, which loads the reward model itself."""
    changes = {"ppo.value_model": "reward", "credit": "sparse", "steps": 1, "sampling.batch_size": 6}
    run = train.train(tiny_runs.config(world, tmp_path / "run", **changes))
    [record] = tiny_runs.read_lines(run.path / "rollouts.jsonl")[:1]
    expected = prefix_scores(tiny_runs.judge(world), record["prompt_ids"], record["response_ids"])
    assert record["value"] == pytest.approx(expected[:-1].tolist(), abs=1e-4)
    assert record["score"] == pytest.approx(float(expected[-1]), abs=1e-4)


def test_a_reward_model_that_reads_text_is_refused(tmp_path: Path) -> None:
    world = foreign_models.world(tmp_path)
    changes = {"ppo.value_model": "reward", "reward_model": world / "other", "credit": "sparse"}
    with pytest.raises(ConfigError, match="ppo.value_model.*its own tokenizer"):
        train.train(tiny_runs.config(world, tmp_path / "run", **changes))


def test_a_head_of_several_layers_is_refused(world: Path) -> None:
    reward = tiny_runs.judge(world)
    reward.model.score = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 1))
    with pytest.raises(ConfigError, match=r"ppo\.value_model.*Sequential.*one linear layer"):
        score_layer(reward)


def test_methods_without_values_refuse_it(world: Path, tmp_path: Path) -> None:
    changes = {"ppo.value_model": "reward", "algorithm": "rloo", "sampling.samples_per_prompt": 2}
    config = tiny_runs.config(world, tmp_path / "run", **changes)
    with pytest.raises(ConfigError, match=r"ppo\.value_model.*reward.*learns no values"):
        train.train(config)
