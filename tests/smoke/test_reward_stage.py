"""`apportion reward` on tiny real data: it learns, saves what it trained, and says honestly how good it is."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from apportion.cli.arguments import parse
from apportion.cli.main import main
from apportion.config import RewardConfig
from apportion.data import Labelled, labelled_splits
from apportion.models.loading import prepared
from apportion.models.reward import RewardModel, load_reward
from apportion.models.saving import save_classifier
from apportion.stages.reward import inputs
from apportion.stages.reward import train as stage
from apportion.stages.reward.evaluation import evaluate, token_ids
from apportion.stages.reward.excerpts import random_excerpts, right_pad

GOOD = ["wonderful", "lovely", "great", "warm", "fine"]
BAD = ["terrible", "boring", "stupid", "dull", "bad"]
NAMES = ["story", "cast", "music", "acting", "plot", "heart", "picture"]


def splits(config: Any) -> tuple[list[Labelled], list[Labelled]]:
    return labelled_splits(config.data, config.test_data, config.test_texts)


def write_reviews(path: Path, count: int, shift: int) -> Path:
    """Write `count` sentences, each praised or blamed by one word of five; `shift` makes other sentences."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(count):
            words, label = (GOOD, 1) if i % 2 else (BAD, 0)
            thing, other = NAMES[(i + shift) % 7], NAMES[(3 * i + shift) % 7]
            text = f"A {words[i % 5]} {thing}, {words[(i + 2) % 5]} {other} {i + 1000 * shift}."
            writer.writerow([text, label])
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_policy(folder / "base")
    write_reviews(folder / "train.csv", 120, 0)
    write_reviews(folder / "test.csv", 60, 1)
    return folder


def flags(world: Path, output: Path, **changes: Any) -> list[str]:
    settings = {
        "model": world / "base",
        "data": world / "train.csv",
        "test_data": world / "test.csv",
        "output": output,
        "excerpts": 960,
        "excerpt_tokens": "[6, 24]",
        "probe_excerpts": 100,
        "batch_size": 16,
        "micro_batch": 8,
        "lora.rank": 4,
        "optim.lr": 0.01,
        "dtype": "float32",
        "device": "cpu",
    }
    return [str(word) for name, value in (settings | changes).items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module", params=[4, 0], ids=["adapters", "all weights"])
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Return the folder of a finished run: adapters merged, or all weights."""
    output = tmp_path_factory.mktemp("reward") / "run"
    rate = 0.01 if request.param else 0.003
    assert main(["reward", *flags(world, output, **{"lora.rank": request.param, "optim.lr": rate})]) == 0
    return output


def rows(path: Path) -> list[tuple[str, int]]:
    with path.open(newline="") as file:
        return [(row["text"], int(row["label"])) for row in csv.DictReader(file)]


def test_it_learns_and_judges_texts_it_never_saw(world: Path, trained: Path) -> None:
    found = json.loads((trained / "evaluation.json").read_text())
    assert found["accuracy"]["low"] > 0.6 and found["texts"] == 60
    assert not {text for text, _ in rows(world / "train.csv")} & {text for text, _ in rows(world / "test.csv")}
    losses = [row["loss/reward"] for row in tiny_runs.read_lines(trained / "metrics.jsonl")]
    assert len(losses) == 60 and sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert 0 <= found["ece"] < 0.5 and sum(b["count"] for b in found["calibration"]) == 60


def test_the_saved_model_judges_as_a_plain_transformers_classifier(world: Path, trained: Path) -> None:
    """The recorded accuracy, mean and sd, recomputed on whole texts without our library."""
    model = AutoModelForSequenceClassification.from_pretrained(trained / "final", dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(trained / "final")
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.config.pad_token_id == tokens.pad_token_id != tokens.eos_token_id
    hits = 0
    for text, label in rows(world / "test.csv"):
        logits = model(torch.tensor([tokens(text, add_special_tokens=False)["input_ids"][:24]])).logits[0]
        hits += int(logits.argmax()) == label
    found = json.loads((trained / "evaluation.json").read_text())
    assert hits / 60 > 0.65 and abs(hits / 60 - found["accuracy"]["mean"]) < 0.2
    assert {t.dtype for t in tiny_runs.weights(trained / "final").values()} == {torch.float32}
    card = (trained / "final" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["apportion", "rlhf", "reward-model"]


def test_mean_and_sd_beside_the_weights_are_those_of_the_held_out_clips(world: Path, trained: Path) -> None:
    stored = json.loads((trained / "final" / "reward.json").read_text())
    config = parse(RewardConfig, "reward", flags(world, trained)).config
    reward = load_reward(str(trained / "final"), device="cpu")
    assert (reward.mean, reward.sd) == (stored["mean"], stored["sd"]) and reward.sd > 0.05
    again = evaluate(trained / "final", splits(config)[1], config)
    assert again["score_mean"] == pytest.approx(stored["mean"], abs=1e-5)
    assert again["score_sd"] == pytest.approx(stored["sd"], abs=1e-5)
    low, high = again["score_interval"]["low"], again["score_interval"]["high"]
    assert low < stored["mean"] < high


@pytest.mark.parametrize(
    ("labels", "positive"),
    [({0: "NEGATIVE", 1: "POSITIVE"}, 1), ({0: "positive", 1: "negative"}, 0), ({0: "LABEL_0", 1: "LABEL_1"}, 1)],
)
def test_the_positive_label_is_found_by_its_name(
    world: Path, tmp_path: Path, labels: dict[int, str], positive: int
) -> None:
    folder = tiny.save_reward(tmp_path / "reward")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"id2label": labels, "label2id": {v: k for k, v in labels.items()}}
    (folder / "config.json").write_text(json.dumps(settings))
    reward = load_reward(str(folder), device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    logits = reward.model(ids).logits[0]
    score, _, _ = reward.score(ids, torch.ones_like(ids, dtype=torch.bool))
    assert float(score) == pytest.approx(float(logits[positive] - logits[1 - positive]), abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_adapters_judge_as_the_adapters_did(world: Path, tmp_path: Path, dtype: str) -> None:
    """The head is trained in float32 over the base, also where the base is in 16 bit, and saved with the rest."""
    config = parse(RewardConfig, "reward", flags(world, tmp_path / "run", dtype=dtype)).config
    tokens = tiny.tokenizer()
    excerpts = random_excerpts(token_ids(splits(config)[0], tokens, config), 64, [6, 24], 0)
    torch.manual_seed(0)
    model = inputs.classifier(config, str(world / "base"), tokens, torch.device("cpu"), excerpts)
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, getattr(torch, dtype))}
    trainable = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trainable:
            parameter += 0.1 * torch.randn_like(parameter)
    save_classifier(model, tokens, str(world / "base"), tmp_path / "final", "card", lora=True)
    merged = prepared(AutoModelForSequenceClassification.from_pretrained(tmp_path / "final", dtype=torch.float32))
    ids, mask, _ = right_pad(excerpts[:8], tokens.pad_token_id)
    one, two = (RewardModel(m.eval(), tokens).score(ids, mask)[0] for m in (model, merged))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5 if dtype == "float32" else 0.2)
    assert one.std() > 0.05


def test_micro_batches_change_no_step(world: Path, tmp_path: Path) -> None:
    losses = []
    for micro in (16, 5):
        assert main(["reward", *flags(world, tmp_path / str(micro), excerpts=64, micro_batch=micro)]) == 0
        losses.append([row["loss/reward"] for row in tiny_runs.read_lines(tmp_path / str(micro) / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 4


def test_the_same_seed_trains_the_same_model(world: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main(["reward", *flags(world, tmp_path / name, excerpts=64, seed=seed)]) == 0
    a, b, c = (tiny_runs.weights(tmp_path / name / "final") for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


def test_without_test_data_a_tenth_is_held_out_for_good(world: Path, tmp_path: Path) -> None:
    write_reviews(tmp_path / "more.csv", 400, 2)
    changes = {"data": tmp_path / "more.csv", "test_data": "null"}
    config = parse(RewardConfig, "reward", flags(world, tmp_path / "run", **changes)).config
    training, held_out = splits(config)
    assert len(training) + len(held_out) == 400 and 15 < len(held_out) < 70
    assert not {r.text for r in training} & {r.text for r in held_out}
    assert 0.2 < sum(r.label for r in held_out) / len(held_out) < 0.8
    assert [r.text for r in splits(config)[1]] == [r.text for r in held_out]


def test_it_serves_the_rl_stage(world: Path, trained: Path, tmp_path: Path) -> None:
    """Centred and scaled by what lies beside its weights."""
    tiny.save_prompts(tmp_path / "prompts.jsonl")
    more = {"policy": world / "base", "reward_model": trained / "final", "prompts": tmp_path / "prompts.jsonl"}
    more |= {"scores.center": "true", "scores.scale": "true"}
    assert main(["rl", *tiny_runs.flags(world, tmp_path / "run", **more)]) == 0
    stored = json.loads((trained / "final" / "reward.json").read_text())
    for record in tiny_runs.read_lines(tmp_path / "run" / "rollouts.jsonl"):
        expected = (record["raw_score"] - stored["mean"]) / stored["sd"]
        assert record["score"] == pytest.approx(expected, abs=1e-4)


def test_an_update_that_is_not_finite_is_skipped_and_counted(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner, calls, before = stage._accumulate, iter(range(1000)), {}

    def spoilt(learner: Any, *given: Any) -> dict[str, torch.Tensor]:
        sums, trainable = inner(learner, *given), learner.trainable
        if "weights" in before:  # after the spoilt batch
            assert all(torch.equal(p, old) for p, old in zip(trainable, before.pop("weights"), strict=True))
        if next(calls) == 4:
            trainable[0].grad.view(-1)[0] = torch.inf
            before["weights"] = [p.detach().clone() for p in trainable]
        return sums

    monkeypatch.setattr(stage, "_accumulate", spoilt)
    assert main(["reward", *flags(world, tmp_path / "run", excerpts=128)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["monitors/skipped_updates"] for line in lines] == [0, 0, 0, 0, 1, 0, 0, 0]
    # the loss of a step that was not taken is no loss of the run's
    measured = {"time/update", "time/total", "memory/rss_mb"}
    assert lines[4].keys() == {"step", "lr", "monitors/skipped_updates"} | measured and not before
    assert "warning: monitor max_skipped at step 5: updates skipped as not finite: 1\n" in capsys.readouterr().err
