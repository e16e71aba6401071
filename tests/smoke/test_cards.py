"""Cards of saved models: front matter that the hub accepts, data by hash, numbers with intervals, no folders."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import trainer_runs
import yaml
from huggingface_hub import ModelCard

from apportion.cli.main import main
from apportion.models.saving import front_matter, hub_base
from apportion.training.publish.card import without_folders
from apportion.training.publish.sources import DataFile, files_in

HEADINGS = ["How to load it", "Method", "Data", "Results", "Limits", "Licence", "Settings"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = trainer_runs.world(tiny_runs.world(tmp_path_factory.mktemp("world")))
    ranked = [
        {
            "prompt": f"Film {i} was",
            "completions": [" a great story.", " a dull story.", " a film."],
            "ranks": [1, 3, 2],
        }
        for i in range(60)
    ]
    trainer_runs.write(folder / "rankings.jsonl", ranked)
    return folder


def trained(world: Path, stage: str, run: Path, **changes: Any) -> Path:
    """Return the final folder of a small run of `stage`."""
    if stage == "rl":
        words = tiny_runs.flags(world, run, **changes)
    elif stage in ("sft", "dpo"):
        data = world / ("demonstrations.jsonl" if stage == "sft" else "pairs.jsonl")
        words = trainer_runs.flags(world, data, run, **{"held_out": 0.2} | changes)
    else:
        settings = {"model": world / "base", "output": run, "excerpts": 32, "batch_size": 8, "probe_excerpts": 8}
        settings |= {"test_texts": 10, "excerpt_tokens": "[4, 8]", "dtype": "float32", "data": world / "reviews.csv"}
        words = [str(word) for name, value in (settings | changes).items() for word in (f"--{name}", value)]
    assert main([stage, *words]) == 0
    return run / "final"


def table(card: str, heading: str) -> list[list[str]]:
    """Return the cells of a section's table, without its head."""
    section = card.split(f"## {heading}\n\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize(
    ("stage", "data", "key", "measure"),
    [
        ("rl", "prompts.jsonl", "", "reward, at the end"),
        ("reward", "reviews.csv", "accuracy", "held-out accuracy"),
        ("reward", "rankings.jsonl", "accuracy", "held-out accuracy"),
        ("sft", "demonstrations.jsonl", "nll_after", "held-out loss after, nats a token"),
        ("dpo", "pairs.jsonl", "margin", "margin of the implicit reward, nats"),
    ],
)
def test_the_card_of_every_stage(world: Path, tmp_path: Path, stage: str, data: str, key: str, measure: str) -> None:
    changes = {"data": world / data} if stage == "reward" else {}
    final = trained(world, stage, tmp_path / "run", license="apache-2.0", **changes)
    card = ModelCard.load(final / "README.md", ignore_metadata_errors=False)
    front = card.data.to_dict()
    assert front["library_name"] == "transformers" and front["license"] == "apache-2.0"
    assert front["tags"][:2] == ["apportion", "rlhf"] and "base_model" not in front  # a folder is no name on the hub
    assert front["pipeline_tag"] == ("text-classification" if stage == "reward" else "text-generation")
    text = str(card)
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == HEADINGS
    digest = hashlib.sha256((world / data).read_bytes()).hexdigest()
    rows = table(text, "Data")
    assert rows and all(f"`{data}`" in row[2] and row[4] == f"`{digest}`" for row in rows)
    assert all(int(row[3]) == (world / data).stat().st_size and re.match(r"\d+ ", row[1]) for row in rows)
    found = {row[0]: row[1:] for row in table(text, "Results")}
    if key:
        expected = json.loads((tmp_path / "run" / "evaluation.json").read_text())[key]
        assert found[measure] == [f"{expected['mean']:.4g}", f"{expected['low']:.4g} to {expected['high']:.4g}"]
    else:
        last = tiny_runs.read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
        assert found[measure][0] == f"{last['objective/scores']:.4g}"
    assert text.count("\n- ") >= 3 and str(tmp_path) not in text and str(world) not in text
    settings = yaml.safe_load(text.split("## Settings")[1].split("```yaml\n")[1].split("```")[0])
    assert settings["seed"] == 0 and settings["license"] == "apache-2.0"
    if data == "rankings.jsonl":
        assert "The mean reward over" in text and "reward_mean" in text


def test_how_to_load_it_works_as_it_stands(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("sft", "reward"):
        final = trained(world, stage, tmp_path / stage)
        code = (final / "README.md").read_text().split("```python\n")[1].split("```")[0]
        assert "path/to/final" in code
        capsys.readouterr()
        exec(code.replace("path/to/final", str(final)), {})
        assert capsys.readouterr().out.strip()


def test_a_card_names_the_base_on_the_hub_behind_folders(tmp_path: Path) -> None:
    assert hub_base("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_base("owner/name") == "owner/name" and hub_base("") is None and hub_base("/not/there") is None
    (tmp_path / "README.md").write_text(front_matter("owner/name", "sft") + "\n# Model\n")
    assert hub_base(str(tmp_path)) == "owner/name"
    (tmp_path / "README.md").write_text("---\nbase_model: [1, 2\n---\n")
    assert hub_base(str(tmp_path)) is None
    front = yaml.safe_load(front_matter("owner/name", "dpo", datasets=["a/b"], licence="mit").split("---")[1])
    assert front["datasets"] == ["a/b"] and front["license"] == "mit" and front["base_model"] == "owner/name"


def test_files_are_named_by_hash_and_paths_lose_their_folders(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("train-0.csv", "train-1.csv"):
        (tmp_path / "set" / name).write_text("text\nx\n")
    found = files_in(str(tmp_path / "set"))
    assert [file.name for file in found] == ["set/train-0.csv", "set/train-1.csv"]
    assert found[0].sha256 == hashlib.sha256(b"text\nx\n").hexdigest() and found[0].size == 7
    assert files_in("owner/data") == [DataFile("owner/data")]
    given = {
        "data": "/home/me/secret/rows.csv",
        "rewards": [{"/home/me/f.py:g": {"weight": 1}}],
        "model": "runs/x/final",
    }
    assert without_folders(given) == {
        "data": "…/rows.csv",
        "rewards": [{"…/f.py:g": {"weight": 1}}],
        "model": "runs/x/final",
    }
