"""`apportion sft` and `apportion dpo` on tiny real data: they learn, save what they trained, and say how good it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import run_folders
import tiny
import tiny_runs
import torch
import trainer_runs
import yaml
from trainer_runs import assistant, user
from transformers import AutoModelForCausalLM, AutoTokenizer

from apportion.cli.arguments import parse
from apportion.cli.main import main
from apportion.config import DPOConfig, SFTConfig
from apportion.data.answers import pairs_of_rankings
from apportion.errors import ModelError
from apportion.models.text.targets import Target
from apportion.report.page import write_report
from apportion.stages.dpo import train as dpo
from apportion.stages.supervised.model import check_packing
from apportion.stages.supervised.readers import demonstrations, preference_pairs
from apportion.stages.supervised.rows import open_start
from apportion.stages.supervised.scoring import answer_logprobs, batches_of
from apportion.training.trainer.run import quiet_trl


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainer_runs.world(tmp_path_factory.mktemp("world"))


@torch.no_grad()
def nll(folder: Path, prompt: str, completion: str) -> float:
    """Return the mean −log p of the completion's tokens and EOS, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(folder)
    ids, start = tokens(prompt + completion + "<eos>")["input_ids"], len(tokens(prompt)["input_ids"])
    logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids))) / (len(ids) - start)


def test_sft_learns_and_reports_the_held_out_loss_that_transformers_gives(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = trainer_runs.write(tmp_path / "test.jsonl", [{"prompt": "Film 99 was", "completion": " a warm story."}])
    run = tmp_path / "run"
    words = trainer_runs.flags(world, world / "demonstrations.jsonl", run, epochs=4, test_data=test)
    assert main(["sft", *words]) == 0
    out, err = capsys.readouterr()
    assert out == f"{run}\n" and "held-out loss" in err and "about" in err and " left" in err
    rows = tiny_runs.read_lines(run / "metrics.jsonl")
    assert len(rows) == 16 and rows[-1]["loss/sft"] < 0.6 * rows[0]["loss/sft"]
    assert rows[0].keys() >= {
        "step",
        "loss/sft",
        "accuracy/tokens",
        "entropy",
        "grad_norm",
        "lr",
        "tokens",
        "time/total",
    }
    found = json.loads((run / "evaluation.json").read_text())
    for name, folder in (("before", world / "base"), ("after", run / "final")):
        expected = nll(folder, "Film 99 was", " a warm story.")
        assert found[f"nll_{name}"]["mean"] == pytest.approx(expected, abs=1e-4)
        assert found[f"perplexity_{name}"] == pytest.approx(math.exp(expected), rel=1e-3)
    assert found["nll_after"]["mean"] < found["nll_before"]["mean"] - 1 and found["training_rows"] == 30
    status = json.loads((run / "status.json").read_text())
    assert (status["stage"], status["status"], status["steps"]) == ("sft", "finished", 16)
    assert json.loads((run / "progress.json").read_text())["step"] == 16
    card = (run / "final" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["apportion", "rlhf", "sft"] and "30 demonstrations" in card
    assert {value.dtype for value in tiny_runs.weights(run / "final").values()} == {torch.float32}


def test_dpo_learns_from_pairs_and_the_policy_goes_on_to_rl(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = trainer_runs.flags(world, world / "chat_pairs.jsonl", run, epochs=3, held_out=0.2)
    assert main(["dpo", *words]) == 0
    assert "held-out pairs: accuracy" in capsys.readouterr().err
    rows = tiny_runs.read_lines(run / "metrics.jsonl")
    assert rows[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6) and rows[-1]["loss/dpo"] < 0.5
    found = json.loads((run / "evaluation.json").read_text())
    assert found["pairs"] > 2 and found["accuracy"]["mean"] == 1.0 and found["margin"]["low"] > 0.2
    assert found["training_pairs"] + found["pairs"] == 30
    rewards = found["reward_chosen"]["mean"] - found["reward_rejected"]["mean"]
    assert found["margin"]["mean"] == pytest.approx(rewards, abs=1e-6)
    tiny.save_reward(tmp_path / "reward")
    tiny.save_prompts(tmp_path / "prompts.jsonl")
    more = {"policy": run / "final", "reward_model": tmp_path / "reward", "prompts": tmp_path / "prompts.jsonl"}
    assert main(["rl", *tiny_runs.flags(world, tmp_path / "rl", **more)]) == 0


@pytest.mark.parametrize("lora", [4, 0])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_bfloat16(world: Path, tmp_path: Path, stage: str, lora: int) -> None:
    data = world / ("demonstrations.jsonl" if stage == "sft" else "pairs.jsonl")
    more = {"dtype": "bfloat16", "lora.rank": lora, "epochs": 2, "held_out": 0.2, "gradient_checkpointing": "true"}
    assert main([stage, *trainer_runs.flags(world, data, tmp_path / "run", **more)]) == 0
    losses = [row[f"loss/{stage}"] for row in tiny_runs.read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] < 0.95 * losses[0]
    assert {value.dtype for value in tiny_runs.weights(tmp_path / "run" / "final").values()} == {torch.float32}


def test_packed_rows_have_the_loss_of_rows_apart(world: Path, tmp_path: Path) -> None:
    losses = []
    for packing in ("true", "false"):
        more = {"packing": packing, "batch_size": 30, "micro_batch": 30, "steps": 1}
        words = trainer_runs.flags(world, world / "demonstrations.jsonl", tmp_path / packing, **more)
        assert main(["sft", *words]) == 0
        losses.append(tiny_runs.read_lines(tmp_path / packing / "metrics.jsonl")[0])
    assert losses[0]["loss/sft"] == pytest.approx(losses[1]["loss/sft"], rel=1e-5)
    assert losses[0]["tokens"] == losses[1]["tokens"]


def test_a_model_that_mixes_packed_rows_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    check_packing(AutoModelForCausalLM.from_config(tiny.config(0)).eval())
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    inner = model.forward

    def mixing(*args: Any, **more: Any) -> Any:  # as a model that knows no positions, such as a recurrent one
        more.pop("position_ids", None)
        return inner(*args, **more)

    model.forward = mixing  # type: ignore[method-assign]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    with pytest.raises(ModelError, match="packing: got .*GPT2LMHeadModel"):
        check_packing(model)


def test_micro_batches_change_no_step(world: Path, tmp_path: Path) -> None:
    """Also where they do not divide a batch: the largest divisor is used."""
    for stage, data in (("sft", "demonstrations"), ("dpo", "pairs")):
        losses = []
        for micro in (8, 3):
            run = tmp_path / f"{stage}-{micro}"
            words = trainer_runs.flags(world, world / f"{data}.jsonl", run, micro_batch=micro, steps=3)
            assert main([stage, *words]) == 0
            losses.append([row[f"loss/{stage}"] for row in tiny_runs.read_lines(run / "metrics.jsonl")])
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_seed_decides(world: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        words = trainer_runs.flags(world, world / "pairs.jsonl", tmp_path / name, seed=seed, steps=2)
        assert main(["dpo", *words]) == 0
    a, b, c = (tiny_runs.weights(tmp_path / name / "final") for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


def test_rankings_give_their_pairs(world: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Film {i}:", "completions": [" fine", " bad", " dull", " odd"], "ranks": ranks}
        for i, ranks in enumerate(([1, 2, 2, 3], [1, 2, 3, 4], [None, 2, None, 1], [1, 1, 1, 1]))
    ]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "rankings.parquet")
    for which, count in (("all", 5 + 6 + 1), ("best_worst", 3)):
        words = trainer_runs.flags(world, tmp_path / "rankings.parquet", tmp_path / which, ranking_pairs=which)
        config = parse(DPOConfig, "dpo", words).config
        found = preference_pairs(config, open_start(config), None)
        assert len(found.training) == count and found.held_out == []
    assert [(p.chosen, p.rejected) for p in pairs_of_rankings("q", "abcd", [2, 1, 2, None])] == [("b", "a"), ("b", "c")]
    best = pairs_of_rankings("q", "abcd", [2, 1, 3, 3], "best_worst")
    assert [(p.prompt, p.chosen, p.rejected) for p in best] == [("q", "b", "c")]


def test_every_form_of_a_demonstration_is_read(world: Path, tmp_path: Path) -> None:
    talk = [user("How?"), assistant("Fine.")]
    rows: dict[str, tuple[dict[str, Any], str]] = {
        "text": ({"text": "A film."}, "A film.<eos>"),
        "messages": ({"messages": talk}, "Fine.<eos>"),
        "texts": ({"prompt": "How?", "completion": " Fine."}, " Fine.<eos>"),
        "turns": ({"prompt": talk[:1], "completion": talk[1:]}, "Fine.<eos>"),
        "json": ({"messages": json.dumps(talk)}, "Fine.<eos>"),
    }
    tokens = AutoTokenizer.from_pretrained(world / "base")
    for name, (row, expected) in rows.items():
        file = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 3), file)
        config = parse(SFTConfig, "sft", trainer_runs.flags(world, file, tmp_path / "run")).config
        found = demonstrations(config, open_start(config), None).training
        assert len(found) == 3
        assert tokens.decode([i for i, on in zip(found[0].ids, found[0].mask, strict=True) if on]) == expected
    named = trainer_runs.write(tmp_path / "named.jsonl", [{"question": "How?", "answer": " Fine."}])
    words = trainer_runs.flags(
        world, named, tmp_path / "run", prompt_column="question", text_column="answer", completion_only="false"
    )
    config = parse(SFTConfig, "sft", words).config
    [row] = demonstrations(config, open_start(config), None).training
    assert tokens.decode(row.ids) == "How? Fine.<eos>" and all(row.mask)


def test_held_out_rows_share_no_prompt_with_the_others(world: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Film {i % 40}:", "completion": f" part {i}."} for i in range(120)]
    file = trainer_runs.write(tmp_path / "a.jsonl", rows)
    config = parse(SFTConfig, "sft", trainer_runs.flags(world, file, tmp_path / "run", held_out=0.3)).config
    found = demonstrations(config, open_start(config), None)
    one, other = ({row.key for row in part} for part in found)
    assert not one & other and len(one | other) == 40 and 0.1 < len(other) / 40 < 0.5


def test_the_saved_model_scores_as_transformers_does(world: Path) -> None:
    config = parse(SFTConfig, "sft", trainer_runs.flags(world, world / "demonstrations.jsonl", "unused")).config
    start = open_start(config)
    rows = demonstrations(config, start, None).training[:7]
    rows.append(Target([5, 6, 7, 8, 9], [False, True, False, True, True], ""))  # with a hole
    model = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32).eval()
    expected = []
    for row in rows:
        with torch.no_grad():
            logp = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        expected.append(sum(float(logp[i - 1, row.ids[i]]) for i in range(1, len(row.ids)) if row.mask[i]))
    assert answer_logprobs(start.folder, rows, config, start).tolist() == pytest.approx(expected, abs=1e-4)
    assert sorted(i for batch in batches_of([5000, 10, 3000, 20, 30]) for i in batch) == [0, 1, 2, 3, 4]
    assert batches_of([5000, 10, 3000, 20, 30])[0] == [0]


def test_dry_run_prints_the_settings_and_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for stage, kind in (("sft", SFTConfig), ("dpo", DPOConfig)):
        assert main([stage, "--dry_run", "--data", "a.jsonl", "--optim.lr", "0.5"]) == 0
        shown = yaml.safe_load(capsys.readouterr().out)
        assert shown["data"] == "a.jsonl" and shown["optim"]["lr"] == 0.5 and kind(**shown)
        with pytest.raises(SystemExit):
            main([stage, "--help"])
        text = capsys.readouterr().out
        assert '"messages"' in text or '"chosen"' in text
        assert f"apportion {stage} --data" in text and "--held_out" in text


def test_the_report_draws_both(world: Path, tmp_path: Path) -> None:
    runs = []
    for stage, data in (("sft", "demonstrations"), ("dpo", "pairs")):
        words = trainer_runs.flags(world, world / f"{data}.jsonl", tmp_path / stage, held_out=0.2)
        assert main([stage, *words]) == 0
        runs.append(tmp_path / stage)
    run_folders.write_reward_run(tmp_path / "reward", "reward")
    page = write_report([*runs, tmp_path / "reward"], tmp_path / "report.html").read_text()
    for piece in (
        "Accuracy of pairs",
        "excerpts classified correctly",
        "Held-out loss",
        "Held-out accuracy",
        "Loss of sft",
        "Loss of dpo",
        "nats a token",
    ):
        assert piece in page, piece


def test_no_telemetry(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL asks the hub's library to report; it is off also in a program that imported that library before."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _telemetry

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # as for a user with a network
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    before = _telemetry._TELEMETRY_QUEUE.qsize()
    words = trainer_runs.flags(world, world / "pairs.jsonl", tmp_path / "run", steps=1)
    dpo.train(parse(DPOConfig, "dpo", words).config)
    assert constants.HF_HUB_DISABLE_TELEMETRY and _telemetry._TELEMETRY_QUEUE.qsize() == before
    assert _telemetry._TELEMETRY_THREAD is None
    with quiet_trl():
        _telemetry.send_telemetry("a", library_name="b", library_version="1")
    assert _telemetry._TELEMETRY_THREAD is None
