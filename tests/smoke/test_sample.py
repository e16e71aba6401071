"""`apportion sample`: rows that every later stage reads, answers that no kill loses or doubles."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import tiny
import tiny_runs
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from apportion.cli.main import main
from apportion.data.answers.item_id import item_id
from apportion.data.answers.rankings import read_rankings
from apportion.stages.sample import sample as stage

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_policy(folder / "policy")
    tiny.save_prompts(folder / "prompts.jsonl", 11)
    return folder


SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "seed": 5,
    "sampling.samples_per_prompt": 3,
    "sampling.batch_size": 6,
    "sampling.max_new_tokens": 7,
    "sampling.temperature": 0.8,
}


def flags(world: Path, output: Path, **changes: Any) -> list[str]:
    given = {"policy": world / "policy", "prompts": world / "prompts.jsonl", "output": output}
    return [str(word) for name, value in (given | SETTINGS | changes).items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sampled") / "run"
    assert main(["sample", *flags(world, output)]) == 0
    return output


@torch.no_grad()
def test_rows_have_the_form_of_samples_and_recomputed_log_probabilities(world: Path, whole: Path) -> None:
    rows = tiny_runs.read_lines(whole / "samples.jsonl")
    prompts = [row["prompt"] for row in tiny_runs.read_lines(world / "prompts.jsonl")]
    assert [row["prompt"] for row in rows] == prompts
    model = AutoModelForCausalLM.from_pretrained(world / "policy").eval()
    tokens = AutoTokenizer.from_pretrained(world / "policy")
    for row in rows:
        assert row["item"] == item_id(row["prompt"], row["completions"]) and row["seed"] == 5
        assert len(row["completions"]) == len(row["completion_ids"]) == len(row["logprobs"]) == len(row["ended"]) == 3
        assert row["policy"] == str(world / "policy") and row["settings"]["temperature"] == 0.8
        assert "sampling_logprobs" not in row and row["settings"]["top_p"] is None
        for text, ids, logprobs, ended in zip(
            row["completions"], row["completion_ids"], row["logprobs"], row["ended"], strict=True
        ):
            prompt = tokens(row["prompt"])["input_ids"]
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.8
            logits[:, [tokens.pad_token_id]] = -torch.inf
            expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert logprobs == pytest.approx(expected.tolist(), abs=1e-3) and len(ids) <= 7
            assert ended == (ids[-1] == tokens.eos_token_id)
            assert row["prompt"] + text == tokens.decode(prompt + ids, skip_special_tokens=True)
    found = json.loads((whole / "evaluation.json").read_text())
    assert (found["prompts"], found["completions"]) == (11, 33)
    assert json.loads((whole / "status.json").read_text())["status"] == "finished"


def test_ranked_samples_are_rankings(whole: Path, tmp_path: Path) -> None:
    rows = tiny_runs.read_lines(whole / "samples.jsonl")
    different = [row for row in rows if len(set(row["completions"])) == 3]
    ranked = [row | {"ranks": [1, 2, 3]} for row in different]
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    assert [one.item for one in read_rankings(str(tmp_path / "ranked.jsonl"))] == [row["item"] for row in different]


def test_parquet_holds_the_same_rows(world: Path, whole: Path, tmp_path: Path) -> None:
    assert main(["sample", *flags(world, tmp_path / "run", format="parquet")]) == 0
    found = pyarrow.parquet.read_table(tmp_path / "run" / "samples.parquet").to_pylist()
    assert found == tiny_runs.read_lines(whole / "samples.jsonl") and not (tmp_path / "run" / "samples.jsonl").exists()
    before = (tmp_path / "run" / "samples.parquet").stat().st_mtime_ns
    assert main(["sample", *flags(world, tmp_path / "run", format="parquet")]) == 0  # finished: nothing is done again
    assert (tmp_path / "run" / "samples.parquet").stat().st_mtime_ns == before


def test_answers_depend_on_the_prompt_and_not_on_its_batch(world: Path, whole: Path, tmp_path: Path) -> None:
    rows = tiny_runs.read_lines(whole / "samples.jsonl")
    assert main(["sample", *flags(world, tmp_path / "run", count=5, **{"sampling.batch_size": 3})]) == 0
    few = tiny_runs.read_lines(tmp_path / "run" / "samples.jsonl")
    assert [row["completion_ids"] for row in few] == [row["completion_ids"] for row in rows[:5]]
    assert main(["sample", *flags(world, tmp_path / "other", seed=6)]) == 0
    other = tiny_runs.read_lines(tmp_path / "other" / "samples.jsonl")
    assert all(a["completion_ids"] != b["completion_ids"] for a, b in zip(rows, other, strict=True))


def test_truncated_answers_have_both_log_probabilities(world: Path, tmp_path: Path) -> None:
    assert main(["sample", *flags(world, tmp_path / "run", **{"sampling.top_k": 4, "sampling.top_p": 0.9})]) == 0
    for row in tiny_runs.read_lines(tmp_path / "run" / "samples.jsonl"):
        assert (row["settings"]["top_k"], row["settings"]["top_p"]) == (4, 0.9)
        for own, drawn in zip(row["logprobs"], row["sampling_logprobs"], strict=True):
            assert all(a <= b + 1e-5 for a, b in zip(own, drawn, strict=True)) and min(own) < min(drawn)


def test_conversations_keep_their_turns(world: Path, tmp_path: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(world / "policy")
    tokens.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    AutoModelForCausalLM.from_pretrained(world / "policy").save_pretrained(tmp_path / "chat")
    tokens.save_pretrained(tmp_path / "chat")
    turns = [{"role": "user", "content": "How?"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": turns}) + "\n")
    words = flags(world, tmp_path / "run", policy=tmp_path / "chat", prompts=tmp_path / "prompts.jsonl")
    assert main(["sample", *words]) == 0
    [row] = tiny_runs.read_lines(tmp_path / "run" / "samples.jsonl")
    assert row["prompt"] == turns and all(isinstance(text, str) for text in row["completions"])


@pytest.mark.parametrize("cut", [0, 1, 40, 3000, 6001])
def test_a_file_that_was_cut_anywhere_is_finished_without_a_lost_or_doubled_prompt(
    world: Path, whole: Path, tmp_path: Path, cut: int
) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        _stopped(world, run)
    data = (whole / "samples.jsonl").read_bytes()
    (run / "samples.jsonl").write_bytes(data[:cut])
    assert main(["sample", *flags(world, run)]) == 0
    assert (run / "samples.jsonl").read_bytes() == data


def _stopped(world: Path, run: Path) -> None:
    """Run until the first batch is written."""
    from apportion.cli.arguments import parse
    from apportion.config import SampleConfig

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    stage.sample_answers(parse(SampleConfig, "sample", flags(world, run)).config, on_step=stop)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_is_resumed(world: Path, whole: Path, tmp_path: Path, number: int) -> None:
    run, words = tmp_path / "run", flags(world, tmp_path / "run", disk_wait=0)
    command = [sys.executable, "-m", "apportion", "sample", *words]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}"}
    began = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    file, limit = run / "samples.jsonl", time.monotonic() + 120
    while not (file.is_file() and file.stat().st_size) and began.poll() is None and time.monotonic() < limit:
        time.sleep(0.001)
    began.send_signal(number)
    _, shown = began.communicate(timeout=60)
    rows = tiny_runs.read_lines(whole / "samples.jsonl")
    if number == signal.SIGTERM and began.returncode != 0:
        assert began.returncode == 143 and "Resume with" in shown
    assert main(["sample", *words]) == 0
    assert tiny_runs.read_lines(file) == rows


def test_other_prompts_or_settings_are_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    prompts = tmp_path / "p.jsonl"
    prompts.write_text((world / "prompts.jsonl").read_text())
    with pytest.raises(KeyboardInterrupt):
        _stopped(world, run)
    assert main(["sample", *flags(world, run, seed=9)]) == 2
    assert "seed was 5" in capsys.readouterr().err
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace(str(world / "prompts.jsonl"), str(prompts))
    )
    prompts.write_text('{"prompt": "Another"}\n' + prompts.read_text())
    assert main(["sample", *flags(world, run, prompts=prompts)]) == 2
    shown = capsys.readouterr().err
    assert "line 1, which is not of prompt 1" in shown and "--fresh" in shown
    assert main(["sample", *flags(world, run, prompts=prompts), "--fresh"]) == 0
    assert len(tiny_runs.read_lines(run / "samples.jsonl")) == 12


@pytest.mark.parametrize(
    ("changes", "piece"),
    [
        ({"sampling.top_p": 0}, "sampling.top_p: got 0; expected a number in (0, 1], or null"),
        ({"sampling.top_k": 0}, "sampling.top_k: got 0"),
        ({"format": "csv"}, "one of jsonl, parquet"),
        ({"sampling.max_new_tokens": 500}, "context of 128 tokens"),
        ({"prompts": "none.jsonl"}, "none.jsonl"),
    ],
)
def test_what_cannot_work_is_named(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], piece: str
) -> None:
    assert main(["sample", *flags(world, tmp_path / "run", **changes)]) == 2
    assert piece in capsys.readouterr().err


def test_a_dry_run_prints_the_settings_and_help_lists_them(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", *flags(world, tmp_path / "run"), "--dry-run"]) == 0
    assert "samples_per_prompt: 3" in capsys.readouterr().out and not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    assert "--sampling.min_p" in capsys.readouterr().out
