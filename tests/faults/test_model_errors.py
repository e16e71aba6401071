"""Models, tokenizers and scores that cannot be used: refused by name, never replaced by something random or by 0."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from broken_models import changed

Command = Callable[..., Any]


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("absent", ["policy: got", "absent'", "a model folder, or a hub id", "There is no such folder"]),
        ("empty", ["policy: got", "a folder with config.json and weights", "save_pretrained"]),
        ("no-config", ["no-config'", "a folder with config.json and weights"]),
        ("no-weights", ["no-weights'", "weights in safetensors", "save_pretrained(folder)"]),
        ("pickled", ["pickled'", "weights in safetensors", "pickled weights (.bin) are not loaded"]),
    ],
)
def test_a_folder_without_a_model_is_named_before_anything_is_loaded(
    command: Command, broken: Path, rl_flags: list[str], name: str, pieces: list[str]
) -> None:
    command("rl", *rl_flags, "--policy", broken / name).assert_refused_early(*pieces)
    others = [piece.replace("policy:", "reward_model:") for piece in pieces]
    command("rl", *rl_flags, "--reward_model", broken / name, "--fresh").assert_refused_early(*others)


@pytest.mark.parametrize(
    ("flag", "name", "pieces"),
    [
        ("policy", "no-json", ["policy: got", "config.json' is not a valid JSON file", "save it again"]),
        ("policy", "no-such-type", ["policy: got", "`llamma`", "a config.json that transformers can read"]),
        ("policy", "no-tokenizer", ["policy: got", "with a tokenizer", "save it again"]),
        ("policy", "missing-layer", ["missing-layer without ['model.layers.1.mlp.up_proj", "would be random"]),
        ("reward_model", "truncated", ["reward_model: got", "file not fully covered", "save it again"]),
        ("reward_model", "three-labels", ["three-labels with 3 labels", "1 or 2 labels", "binary classifier"]),
        ("reward_model", "other-vocabulary", ["reward_model's tokenizer: got \"'film' (400)", "400 embeddings"]),
        (
            "reward_model",
            "slow-tokenizer",
            ["reward_model's tokenizer: got 'ByT5Tokenizer'", "a fast one", "tokenizer.json"],
        ),
        (
            "reward_model",
            "short-encoder",
            ["reward_model: got 'a model of 6 positions, and a prompt of", "Lower sampling.max_new_tokens"],
        ),
        ("reward_model", "damaged-statistics", ["reward.json: got", '{"mean": number', "Delete the file"]),
        ("policy", "nan-policy", ["policy's log-probabilities in rollout 0: got nan", "Check its weights"]),
    ],
)
def test_an_unfit_model_is_named(
    model_command: Command, broken: Path, rl_flags: list[str], flag: str, name: str, pieces: list[str]
) -> None:
    model_command("rl", *rl_flags, "--algorithm", "abc", f"--{flag}", broken / name).assert_refused(*pieces)


def test_a_token_without_an_embedding_is_named_before_it_is_learned_from(
    model_command: Command, world: Path, broken: Path
) -> None:
    data = ("--data", world / "reviews.csv", "--output", "run", "--excerpts", 16, "--batch_size", 4)
    done = model_command("reward", "--model", broken / "other-vocabulary", *data)
    done.assert_refused("model's tokenizer: got \"'film' (400)", "below the model's 400 embeddings", "resize_token")


@pytest.mark.parametrize("wrong", [{"eos_token_id": 2.5}, {"max_new_tokens": -1}])
def test_generation_settings_that_cannot_be_are_named(
    model_command: Command, tmp_path: Path, tiny: ModuleType, rl_flags: list[str], wrong: dict[str, Any]
) -> None:
    file = tiny.save_policy(tmp_path / "m") / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    model_command("rl", *rl_flags, "--policy", "m").assert_refused("m/generation_config.json: got ", "Fix it")


def test_an_encoder_is_a_reward_model(model_command: Command, broken: Path, rl_flags: list[str]) -> None:
    """With the policy's vocabulary too: its score is not read at the last token, so it reads the text."""
    model_command("rl", *rl_flags, "--reward_model", broken / "encoder").assert_done()


def test_a_reward_model_may_pad_with_eos(model_command: Command, broken: Path, rl_flags: list[str]) -> None:
    model_command("rl", *rl_flags, "--reward_model", broken / "reward-pad-is-eos").assert_done()


def test_a_causal_model_is_no_reward_model(model_command: Command, world: Path, rl_flags: list[str]) -> None:
    done = model_command("rl", *rl_flags, "--reward_model", world / "policy")
    done.assert_refused("reward_model: got", "policy without ['score.weight']", "These weights would be random")


def test_an_unknown_hub_id_without_a_network_is_one_error(model_command: Command, rl_flags: list[str]) -> None:
    done = model_command("rl", *rl_flags, "--policy", "nobody/no-such-model")
    done.assert_refused("policy: got", "nobody/no-such-model (", "a hub id needs the network or a cached copy")


def test_a_pad_token_fixes_the_tokenizer(model_command: Command, broken: Path, rl_flags: list[str]) -> None:
    both = ("--policy", broken / "pad-is-eos")
    for word in ("<pad>", "<unk>"):  # unknown tokens are tokens
        model_command("rl", *rl_flags, *both, "--pad_token", word, "--fresh").assert_done()


def test_a_tokenizer_without_eos_can_only_write_fixed_lengths(
    model_command: Command, broken: Path, rl_flags: list[str]
) -> None:
    flags = (*rl_flags, "--policy", broken / "no-eos")
    model_command("rl", *flags, "--sampling.stop", "eos").assert_refused("no EOS token", "--sampling.stop length")
    model_command("rl", *flags).assert_done()


@pytest.mark.parametrize(("flags", "pieces"), [
    (["--sampling.max_prompt_tokens", "20"], ["prompt 2: got '90 tokens: film film", "1 to 20 tokens", "Shorten it"]),
    (["--sampling.max_new_tokens", "40"], ["prompt 2: got '90 tokens: film film", "1 to 88 tokens", "context 128"]),
    (["--sampling.max_new_tokens", "128"], ["sampling.max_new_tokens: got 128", "context of 128", "Lower it"]),
])  # fmt: skip
def test_a_prompt_that_does_not_fit_is_named(
    model_command: Command, tmp_path: Path, rl_flags: list[str], flags: list[str], pieces: list[str]
) -> None:
    rows = [{"prompt": "short"}, {"prompt": "film" + " film" * 87}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    longer = ("--prompts", "p.jsonl", "--sampling.prompt_tokens", "null")
    model_command("rl", *rl_flags, *longer, *flags).assert_refused(*pieces)


def test_a_conversation_needs_a_chat_template(model_command: Command, tmp_path: Path, rl_flags: list[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": [{"role": "user", "content": "hello"}]}\n')
    done = model_command("rl", *rl_flags, "--prompts", "p.jsonl")
    done.assert_refused("prompts: got", "chat template", "Give prompts as text")


@pytest.mark.parametrize(("name", "got"), [("nan-head", "nan"), ("inf-head", "inf")])
def test_a_score_that_is_no_number_teaches_nothing(
    model_command: Command, tmp_path: Path, broken: Path, rl_flags: list[str], name: str, got: str
) -> None:
    done = model_command("rl", *rl_flags, "--reward_model", broken / name)
    done.assert_refused("score of rollout 0: got", got, "a finite number", "A failure never becomes a reward")
    run = tmp_path / "run"
    assert not (run / "metrics.jsonl").exists() and not (run / "rollouts.jsonl").exists()
    assert json.loads((run / "status.json").read_text())["status"] == "failed"


def test_the_rollout_of_a_bad_score_is_named_by_its_place_in_the_batch(
    model_command: Command, tmp_path: Path, tiny: ModuleType, rl_flags: list[str]
) -> None:
    rare = torch.tensor(tiny.tokenizer()("~")["input_ids"])
    reward = tiny.save_reward(tmp_path / "reward")
    changed(reward, lambda w: w["model.embed_tokens.weight"].index_fill_(0, rare, torch.nan))
    texts = ["a film", "a story", "a film ~", "a cast"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    place = torch.randperm(4, generator=torch.Generator().manual_seed(0)).tolist().index(2)
    assert place > 0  # the first one would be found without counting
    given = ("--reward_model", reward, "--prompts", "p.jsonl", "--sampling.prompt_tokens", "null")
    done = model_command("rl", *rl_flags, *given, "--scores.micro_batch", 1)
    done.assert_refused(f"score of rollout {place}: got nan")


@pytest.mark.parametrize(
    ("rank", "pieces"),
    [
        (0, ["loss of 3 updates in a row (monitors.max_skipped): got inf", "run/stopped/step-4"]),
        (4, ["log-probabilities in rollout 0: got nan"]),  # it cannot sample any more
    ],
)
def test_training_that_diverges_is_reported(
    model_command: Command, rl_flags: list[str], rank: int, pieces: list[str]
) -> None:
    done = model_command("rl", *rl_flags, "--lora.rank", rank, "--optim.lr", "1e30", "--steps", "4")
    before = done.err[: done.err.index("apportion:")]
    done.assert_refused(*pieces, "finite number", "ower optim.lr", before=before)


def test_a_reward_model_that_diverges_is_reported(model_command: Command, world: Path) -> None:
    flags = (
        "--data",
        world / "reviews.csv",
        "--output",
        "run",
        "--excerpts",
        64,
        "--batch_size",
        4,
        "--optim.lr",
        "1e30",
    )
    done = model_command("reward", "--model", world / "policy", *flags)
    before = done.err[: done.err.index("apportion:")]
    done.assert_refused("of 3 updates in a row (max_skipped): got", "finite number", "ower optim.lr", before=before)


def test_other_settings_that_do_not_fit_the_model(model_command: Command, world: Path, rl_flags: list[str]) -> None:
    done = model_command("rl", *rl_flags, "--lora.targets", "[q_proj, nope]")
    done.assert_refused("lora.targets: got ['q_proj', 'nope']", "v_proj", "Use attention, all")
    data = ("--data", world / "reviews.csv", "--output", "reward", "--excerpt_tokens", "[8, 200]")
    done = model_command("reward", "--model", world / "policy", *data)
    done.assert_refused("excerpt_tokens: got [8, 200]", "context of 128 tokens", "Lower the second number")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_named(model_command: Command, rl_flags: list[str]) -> None:
    model_command("rl", *rl_flags, "--device", "cuda").assert_refused(
        "device: got 'cuda'", "cpu or auto", "sees no GPU"
    )
