"""Evidence that a reward model cannot give: refused before anything is sampled if it is needed, else left out."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import foreign_models
import pytest
import tiny
import tiny_runs
import tiny_tokenizers
import torch
from transformers import AutoConfig, AutoModelForCausalLM, ModernBertConfig

from apportion.config import DiagnoseConfig
from apportion.errors import ModelError, ScoreError
from apportion.models.reward import check_width, load_reward
from apportion.models.text.token_spans import PolicyText
from apportion.stages.diagnose.candidates import candidates
from apportion.stages.diagnose.diagnose import open_models
from apportion.stages.method import build_method
from apportion.stages.rl.learner import Learner, make_learner

CREDIT = "[{sparse: {}}, {kl_penalty: {coef: 0.1}}]"
COMMON = {"vocab_size": 400, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "num_hidden_layers": 2}
HEADS = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
MIXED = {"head_dim": 16, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
WITHOUT_ATTENTION = {
    "mamba": {"hidden_size": 32, "state_size": 4},
    "qwen3_5_text": HEADS | LINEAR | MIXED,
    "lfm2": HEADS | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
}


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


def test_an_attention_that_fails_in_a_batch_does_not_spoil_the_forward_that_the_update_begins_with(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is only compared is asked for once more, apart, in a forward without values that is not the update's."""
    weights = []
    for compare in ("[sparse]", "[policy_attention]"):
        warnings: list[str] = []
        changes = {"ppo.mini_batch": 6, "ppo.micro_batch": 6, "compare": compare}
        made = learner(world, warnings, reward_model=world / "pooled", credit=CREDIT, **changes)
        monkeypatch.setattr("apportion.evidence.policy.mean_attention", no_attention)
        metrics, _ = tiny_runs.one_batch(made)
        monkeypatch.undo()
        assert metrics.get("compare/left_out", 0) == (compare != "[sparse]") and metrics["loss/value"] > 0
        weights.append([one.detach().clone() for one in made.policy.trainable()])
    assert "policy_attention is left out of the log" in warnings[-1]
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def no_attention(*args: object) -> torch.Tensor:
    raise ModelError("policy", "weights that were not captured", "attention of a kind that can be", "Choose another.")


OWN_CREDIT = """from apportion import Credit

CALLS = []


def no_answer(models, rollouts, texts):
    CALLS.append(len(texts))
    raise RuntimeError("no answer today")


def own():
    needs = frozenset({"my_evidence:no_answer"})
    return Credit(lambda: {}, lambda rollouts, rewards, state: (rewards, state), needs, True, False)
"""


def test_evidence_that_is_only_compared_never_ends_a_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that fails leaves its batch out, what fails without a row is not tried again; each is named once."""
    (tmp_path / "my_evidence.py").write_text(OWN_CREDIT)
    monkeypatch.syspath_prepend(tmp_path)
    names = ["sparse", "shapley", "implicit", "process", "attribution", "prefix_difference", "my_evidence:own"]
    warnings: list[str] = []
    made = learner(world, warnings, credit=CREDIT, compare=json.dumps(names), log_rollouts=6)
    start = [line for line in warnings if "compare" in line]
    assert [line.split(" is not logged: ")[0].split()[-1] for line in start] == ["implicit", "process"]
    assert "got 'no model'; expected the setting 'model' of its method." in start[0] and "--credit" not in start[0]

    batch = made.source.take(1)
    empty = replace(batch, prompt_mask=batch.prompt_mask & (torch.arange(len(batch)) != 3)[:, None])
    metrics, records = tiny_runs.one_batch(made, 1, empty)
    assert metrics["compare/left_out"] == 2
    assert set(records[0]["methods"]) == {"sparse", "attribution", "prefix_difference"}
    later = [line for line in warnings if "is left out of the log where it fails (compare/left_out counts)" in line]
    assert [line.split()[2] for line in later] == ["shapley", "my_evidence:own"]
    assert "prompt of rollout 3: got 'no tokens'" in later[0]
    assert "my_evidence:no_answer: got 'RuntimeError: no answer today" in later[1]

    metrics, records = tiny_runs.one_batch(made, 2, batch)
    assert metrics["compare/left_out"] == 1 and len(sys.modules["my_evidence"].CALLS) == 1
    assert set(records[0]["methods"]) == {"sparse", "shapley", "attribution", "prefix_difference"}
    for record in records:
        assert sum(record["methods"]["shapley"]) == pytest.approx(record["score"], abs=1e-4)
        assert sum(record["methods"]["prefix_difference"]) == pytest.approx(record["score"], abs=1e-4)
    assert len([line for line in warnings if "compare" in line]) == 4

    needed = learner(world, [], credit="[shapley]", compare="[]")
    with pytest.raises(ScoreError, match="prompt of rollout 3: got 'no tokens'"):
        tiny_runs.one_batch(needed, 1, empty)


@pytest.mark.parametrize("family", ["mamba", "qwen3_5_text", "lfm2"])
def test_a_policy_without_attention_weights_is_compared_without_them(world: Path, tmp_path: Path, family: str) -> None:
    """Of a hybrid some layers have attention, of a recurrent model none."""
    torch.manual_seed(0)
    settings = AutoConfig.for_model(family, **COMMON | WITHOUT_ATTENTION[family])
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path / family)
    tiny.tokenizer().save_pretrained(tmp_path / family)
    warnings: list[str] = []
    changes = {"policy": tmp_path / family, "lora.rank": 0, "credit": CREDIT}
    made = learner(world, warnings, **changes)
    (line,) = [one for one in warnings if "compare" in one]
    assert "policy_attention is not logged: attention_row(" in line
    metrics, records = tiny_runs.one_batch(made)
    assert set(records[0]["methods"]) == {"sparse", "uniform", "attention"} and "compare/left_out" not in metrics
    with pytest.raises(ModelError, match=r"attention_row\("):
        learner(world, [], **changes | {"credit": "[policy_attention]"})


def test_attention_that_the_method_needs_is_refused_before_anything_is_sampled(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"reward_attention: got 'ModernBert\w+, whose score is pooled") as error:
        learner(world, [], reward_model=world / "pooled")
    assert "prefix_difference" in error.value.fix and "uniform" in error.value.fix
    files = {"policy": world / "policy", "reward_model": world / "pooled", "prompts": world / "prompts.jsonl"}
    config = DiagnoseConfig(**{name: str(file) for name, file in files.items()}, output=str(tmp_path), device="cpu")
    with pytest.raises(ModelError, match=r"reward_attention: got 'ModernBert\w+, whose score is pooled"):
        open_models(config, candidates(config.methods, 1.0))
    models, _ = open_models(config, candidates(["sparse", "prefix_difference"], 1.0))
    assert models.reward.reading.place == "pooled"


def test_a_reward_model_with_too_few_embeddings_is_refused_at_the_start(world: Path) -> None:
    with pytest.raises(
        ModelError, match=r"reward_model: got .a model of \d+ embeddings.*every token that the policy may"
    ):
        learner(world, [], reward_model=world / "narrow")


def test_a_reward_model_with_too_few_positions_is_refused_at_the_start(world: Path, tmp_path: Path) -> None:
    """One that reads the policy's ids would end the run, or read past what it learned, at the first long prompt."""
    longest = 9 + tiny_runs.SETTINGS["sampling.max_new_tokens"]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": tiny.tokenizer().decode(list(range(60, 69)))}) + "\n")
    changes = {"prompts": tmp_path / "p.jsonl", "sampling.prompt_tokens": "null", "reward_model": tmp_path / "few"}
    for positions in (longest, longest - 1):
        config = foreign_models.decoder(max_position_embeddings=positions)
        foreign_models.save_model(tmp_path / "few", tiny.tokenizer(), config)
        if positions == longest:
            tiny_runs.one_batch(learner(world, [], **changes))
            continue
        text = rf"a model of {positions} positions, which scores .* up to {longest} with"
        with pytest.raises(ModelError, match=text):
            learner(world, [], **changes)
    words = tiny_tokenizers.byte_fallback()  # one that scores text: its prompts alone have to fit
    alone = len(words(tiny.tokenizer().decode(list(range(60, 69))) + "a")["input_ids"]) - 1
    foreign_models.save_model(tmp_path / "text", words, foreign_models.decoder(max_position_embeddings=alone))
    with pytest.raises(ModelError, match=rf"a model of {alone} positions, and a prompt of {alone} tokens in its own"):
        learner(world, [], **changes | {"reward_model": tmp_path / "text"})
    foreign_models.save_model(tmp_path / "text", words, foreign_models.decoder(max_position_embeddings=alone + 1))
    longer = learner(world, [], **changes | {"reward_model": tmp_path / "text"})  # its responses are not known yet
    with pytest.raises(
        ScoreError, match=rf"at most {alone + 1}, the reward model's context. Texts are never truncated"
    ):
        tiny_runs.one_batch(longer)


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
    with pytest.raises(ModelError):  # a prompt has it
        check_width("reward_model", reward, tokenizer, width + 1, [[5], [6, width]])


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
