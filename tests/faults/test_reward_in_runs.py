"""Evidence that a reward model cannot give: refused before anything is sampled if it is needed, else left out."""

from __future__ import annotations

from pathlib import Path

import foreign_models
import pytest
import tiny
import tiny_runs
import torch
from transformers import ModernBertConfig

from apportion.errors import ModelError, ScoreError
from apportion.models.reward import check_width, load_reward
from apportion.models.text.token_spans import PolicyText
from apportion.stages.method import build_method
from apportion.stages.rl.learner import Learner, make_learner

CREDIT = "[{sparse: {}}, {kl_penalty: {coef: 0.1}}]"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_runs.world(tmp_path_factory.mktemp("world"))
    edges = {"cls_token_id": 2, "sep_token_id": 1, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    config = ModernBertConfig(vocab_size=400, num_labels=1, classifier_pooling="mean", **foreign_models.SIZES, **edges)
    foreign_models.save_model(folder / "pooled", tiny.tokenizer(), config)
    used = max(tiny.tokenizer().get_vocab().values())
    foreign_models.save_model(folder / "narrow", tiny.tokenizer(), foreign_models.decoder(vocab_size=used))
    return folder


def learner(world: Path, warnings: list[str], **changes: object) -> Learner:
    config = tiny_runs.config(world, world / "run", **changes)
    return make_learner(config, build_method(config), warn=warnings.append)


def test_attention_that_is_only_compared_is_left_out_with_one_line(world: Path) -> None:
    warnings: list[str] = []
    made = learner(world, warnings, reward_model=world / "pooled", credit=CREDIT)
    (line,) = [one for one in warnings if "compare" in one]
    assert "attention is not logged: reward_attention: got 'ModernBert" in line.replace(
        "got ModernBert", "got 'ModernBert"
    )
    assert set(made.compare) == {"sparse", "uniform", "policy_attention"} and "reward_attention" not in made.needs
    _, records = tiny_runs.one_batch(made)
    assert set(records[0]["methods"]) == set(made.compare) and "alpha" not in records[0]


def test_attention_that_the_method_needs_is_refused_before_anything_is_sampled(world: Path) -> None:
    with pytest.raises(ModelError, match=r"reward_attention: got 'ModernBert\w+, whose score is pooled") as error:
        learner(world, [], reward_model=world / "pooled")
    assert "prefix_difference" in error.value.fix and "uniform" in error.value.fix


def test_a_reward_model_with_too_few_embeddings_is_refused_at_the_start(world: Path) -> None:
    with pytest.raises(
        ModelError, match=r"reward_model: got .a model of \d+ embeddings.*every token that the policy may"
    ):
        learner(world, [], reward_model=world / "narrow")


def test_tokens_that_the_policy_cannot_write_need_no_embedding(world: Path) -> None:
    """A tokenizer may have more tokens than either model; its pad token is never sampled."""
    tokenizer = tiny.tokenizer()
    reward = load_reward(str(world / "narrow"), device="cpu", policy=PolicyText(tokenizer))
    width = len(reward.model.get_input_embeddings().weight)
    check_width("reward_model", reward, tokenizer, width)
    with pytest.raises(ModelError):
        check_width("reward_model", reward, tokenizer, width + 1)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(width)
    check_width("reward_model", reward, tokenizer, width + 1)


def test_an_id_without_an_embedding_is_named_by_its_row(world: Path) -> None:
    reward = load_reward(str(world / "narrow"), device="cpu")
    ids = torch.tensor([[5, 6], [7, len(reward.model.get_input_embeddings().weight)]])
    with pytest.raises(ScoreError, match=r"text of rollout 1: got 'id \d+'; expected ids below the model's \d+"):
        reward.score(ids, torch.ones_like(ids, dtype=torch.bool))


def test_a_policy_with_one_more_token_to_pad_with_shares_the_vocabulary(world: Path) -> None:
    tokenizer = tiny.tokenizer(pad=None)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    reward = load_reward(str(world / "reward"), device="cpu", policy=PolicyText(tokenizer), pad_token="[PAD]")
    assert reward.text is None and reward.model.config.pad_token_id == 0
    batch = tiny_runs.rollouts_of(tiny_runs.prompts(3), [[50, 1], [60, 61, 1], [70]])
    pads = len(tokenizer) - 1
    ids = batch.prompt_ids.masked_fill(~batch.prompt_mask, pads), batch.response_ids.masked_fill(~batch.mask, pads)
    found = reward.score(torch.cat(ids, dim=1), torch.cat([batch.prompt_mask, batch.mask], dim=1))[0]
    for row in range(3):
        alone = torch.tensor([[i for part in tiny_runs.alone(batch, row) for i in part]])
        logits = reward.model(alone).logits[0].detach()
        assert float(found[row]) == pytest.approx(float(logits[1] - logits[0]), abs=1e-5)
