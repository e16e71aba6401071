"""Preference pairs: read in every form, cut where they differ, and learned from by the Bradley–Terry loss."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_runs
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from apportion.cli.main import main
from apportion.config import RewardConfig
from apportion.data import Labelled, Layout, labelled, labelled_splits
from apportion.errors import DataError
from apportion.models.text.labelled import chat_renderer, token_rows
from apportion.stages.doctor import Case
from apportion.stages.doctor.checks import labels
from apportion.stages.reward import inputs
from apportion.stages.reward.evaluation import accuracy, token_ids
from apportion.stages.reward.excerpts import (
    Excerpt,
    ExcerptPair,
    TokenRows,
    flat,
    random_cuts,
    random_pairs,
    right_pad,
    shuffled_batches,
)
from apportion.stages.reward.learner import RewardLearner
from apportion.stages.reward.losses import both_orders, decisions, summed_loss
from apportion.stages.reward.probe import PENALTY, pooled_features, probe_head
from apportion.stages.reward.train import _accumulate

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
ASK = [{"role": "user", "content": "How?"}]
GOOD, BAD = [{"role": "assistant", "content": "Fine."}], [{"role": "assistant", "content": "No."}]
CHATS = ("<user>How?<eos><assistant>Fine.<eos>", "<user>How?<eos><assistant>No.<eos>")


def renderer() -> Any:
    tokens = tiny.tokenizer()
    tokens.chat_template = CHAT
    return chat_renderer(lambda: tokens)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "texts", "prompt"),
    [
        ({"chosen": "How? Fine.", "rejected": "How? No."}, ("How? Fine.", "How? No."), 0),
        ({"prompt": "How?", "chosen": " Fine.", "rejected": " No."}, ("How? Fine.", "How? No."), 4),
        ({"prompt": ASK, "chosen": GOOD, "rejected": BAD}, CHATS, 26),
        ({"chosen": ASK + GOOD, "rejected": ASK + BAD}, CHATS, 26),
        ({"prompt": "How?", "chosen": ASK + GOOD, "rejected": ASK + BAD, "messages": ASK + GOOD}, CHATS, 26),
        ({"prompt": json.dumps(ASK), "chosen": json.dumps(GOOD), "rejected": json.dumps(BAD)}, CHATS, 26),
    ],
)
def test_every_form_of_a_pair_is_read(tmp_path: Path, row: dict[str, Any], texts: tuple[str, str], prompt: int) -> None:
    found = labelled(write(tmp_path / "a.jsonl", [row]), render=renderer(), pairs=True)
    rendered = texts == CHATS
    assert found == [Labelled(texts[i], 1 - i, prompt, True, rendered) for i in (0, 1)]
    # a label makes it a labelled row: its text is the one that the usual columns name
    labelled_row = write(tmp_path / "b.jsonl", [row | {"label": 1, "text": "A text."}])
    assert labelled(labelled_row, pairs=True) == [Labelled("A text.", 1)]


@pytest.mark.parametrize(
    ("row", "pieces"),
    [
        ({"chosen": ASK + GOOD, "rejected": [{**ASK[0], "content": "Why?"}, *BAD]}, ["answers to one conversation"]),
        (
            {"chosen": "Fine.", "rejected": GOOD},
            ["two texts, or two answers to one conversation", "pass --skip_bad_rows"],
        ),
        ({"prompt": "Why?", "chosen": ASK + GOOD, "rejected": ASK + BAD}, ["prompt = str, chosen = list"]),
        ({"prompt": "How?", "chosen": "Fine.", "rejected": " "}, ["rejected = ' '", "Fill it in"]),
    ],
)
def test_a_pair_that_cannot_be_compared_is_named(tmp_path: Path, row: dict[str, Any], pieces: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        labelled(write(tmp_path / "a.jsonl", [row]), render=renderer(), pairs=True)
    assert all(piece in str(caught.value) for piece in ("a.jsonl, line 1", *pieces)), caught.value


@pytest.mark.parametrize(
    ("same", "other"),
    [
        ({"chosen": "Fine.", "rejected": "Fine."}, {"chosen": "Fine.", "rejected": "No."}),
        ({"prompt": ASK, "chosen": GOOD, "rejected": GOOD}, {"prompt": ASK, "chosen": GOOD, "rejected": BAD}),
    ],
)
def test_pairs_of_equal_texts_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], same: dict[str, Any], other: dict[str, Any]
) -> None:
    alone = labelled(write(tmp_path / "alone.jsonl", [other]), render=renderer(), pairs=True)
    assert capsys.readouterr().err == ""
    source = write(tmp_path / "a.jsonl", [same, other, same])
    assert labelled(source, render=renderer(), pairs=True) == alone
    assert f"data: {source}: 2 of 3 pairs have two equal texts" in capsys.readouterr().err
    with pytest.raises(DataError, match="2 pairs, all of two equal texts"):
        labelled(write(tmp_path / "b.jsonl", [same, same]), render=renderer(), pairs=True)


def pair(chosen: str, rejected: str, prompt: int = 0) -> list[Labelled]:
    return [Labelled(chosen, 1, prompt, True), Labelled(rejected, 0, prompt, True)]


def test_pairs_of_one_prompt_are_on_one_side_and_stay_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i % 60}?", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(240)]
    training, held_out = labelled_splits(write(tmp_path / "a.jsonl", rows), None, 7)
    for side in (training, held_out):
        assert all(a.label == 1 and b.label == 0 for a, b in zip(side[::2], side[1::2], strict=True))
        assert all(a.text.replace("yes", "no") == b.text for a, b in zip(side[::2], side[1::2], strict=True))
    prompts = [{row.text[: row.prompt] for row in side} for side in (training, held_out)]
    assert not prompts[0] & prompts[1] and len(held_out) == 14 and 300 < len(training) < 480
    few = [row | {"prompt": "Question?"} for row in rows]  # no prompt to spare: other answers to it are held out
    training, held_out = labelled_splits(write(tmp_path / "few.jsonl", few), None, 1000)
    assert len(training) + len(held_out) == 480 and 20 < len(held_out) < 100
    assert not {row.text for row in training} & {row.text for row in held_out}
    single = write(tmp_path / "b.jsonl", [{"text": "a", "label": 1}])
    with pytest.raises(DataError, match="test_data: got 'labelled texts'; expected preference pairs"):
        labelled_splits(str(tmp_path / "a.jsonl"), single, 7)


def test_both_excerpts_are_cut_equally_far_behind_what_they_share() -> None:
    tokens = tiny.tokenizer()
    common = "A lovely little picture with a warm heart, " * 40
    rows = [*pair(common + "good music and a fine cast", common + "good jokes and a dull plot"), *pair("One", "Other")]
    ids, starts = token_rows(rows, tokens, 4)
    assert starts[0] == starts[1] > 40 and starts[2] == starts[3]
    assert ids[0][: starts[0]] == ids[1][: starts[0]] and ids[0][starts[0]] != ids[1][starts[0]]
    found = random_pairs(TokenRows(ids, [1, 0, 1, 0], starts, [([], [])] * 4, True), 60, [1, 4], 3)
    assert {len(one.chosen.ids) - starts[0] for one in found if len(one.ids) > 40} == {1, 2, 3, 4}
    assert sum(len(one.ids) > 40 for one in found) == 30
    for one in found:
        first = 0 if len(one.ids) > 40 else 2
        assert one.chosen.ids == ids[first][: len(one.chosen.ids)] and one.chosen.ids != one.rejected.ids
        assert one.rejected.ids == ids[first + 1][: len(one.rejected.ids)]
        assert (one.chosen.label, one.rejected.label) == (1, 0)
    batches = shuffled_batches(found, 8, 0)
    assert sorted(map(repr, (one for batch in batches for one in batch))) == sorted(map(repr, found))


def pairs_of(*ids: tuple[list[int], list[int]]) -> list[ExcerptPair]:
    return [ExcerptPair(Excerpt(chosen, 1), Excerpt(rejected, 0)) for chosen, rejected in ids]


def test_the_loss_is_that_of_bradley_and_terry() -> None:
    excerpts = pairs_of(([5], [6]), ([7, 8], [9]))
    assert [one.ids for one in flat(excerpts)] == [[5], [7, 8], [6], [9]]
    # R of the chosen ones 1.5 and -2, of the rejected ones 0.5 and 1: margins 1 and -3
    logits = torch.tensor([[0.5, 2.0], [1.0, -1.0], [0.0, 0.5], [2.0, 3.0]], requires_grad=True)
    loss, right = summed_loss(logits, torch.tensor([1, 1, 0, 0]), excerpts)
    expected = -math.log(1 / (1 + math.exp(-1.0))) - math.log(1 / (1 + math.exp(3.0)))
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-6) and int(right) == 1
    loss.backward()
    slopes = [1 / (1 + math.exp(1.0)), 1 / (1 + math.exp(-3.0))]  # σ(−margin)
    positive = [-slopes[0], -slopes[1], slopes[0], slopes[1]]
    assert logits.grad is not None and logits.grad[:, 1].tolist() == pytest.approx(positive, abs=1e-6)
    assert torch.equal(logits.grad[:, 0], -logits.grad[:, 1])
    margins, truth = decisions(torch.tensor([1.5, -2.0, 0.5, 1.0]), excerpts)
    assert margins.tolist() == [1.0, -3.0] and truth == [1, 1] and accuracy(margins, truth)["mean"] == 0.5
    doubled, classes = both_orders(margins, truth, True)
    assert doubled.tolist() == [1.0, -3.0, -1.0, 3.0] and classes == [1, 1, 0, 0]


def test_the_probe_is_a_bradley_terry_model_of_the_features(tmp_path: Path) -> None:
    """At its optimum the penalty's gradient is that of the loss, with sklearn's weights of both."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny.config(0, num_labels=2)).eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 400, (40, 2, 6), generator=generator).tolist()
    excerpts = pairs_of(*((a, b) for a, b in ids))
    share = probe_head(model, model.score, excerpts, 0)
    features = pooled_features(model, model.score, flat(excerpts), 0).numpy()
    half = features[:40] - features[40:]
    difference = half / (np.concatenate([half, -half]).std(axis=0) + 1e-6)
    weight = (model.score.weight[1] - model.score.weight[0]).detach().numpy()
    margin = half @ weight
    scaled = weight * (np.concatenate([half, -half]).std(axis=0) + 1e-6)
    slope = 2 * (difference / (1 + np.exp(margin))[:, None]).sum(axis=0)
    np.testing.assert_allclose(scaled, PENALTY * slope, atol=2e-5)
    assert np.abs(scaled).max() > 1e-3
    assert share == pytest.approx(float((margin > 0).mean()))


def test_the_doctor_knows_pairs() -> None:
    rows = [row for i in range(50) for row in pair(f"good {i}", f"bad {i}")]
    balance = labels.balance(Case(None, training=rows, held_out=rows[:4]))
    assert balance == ("ok", "50 training pairs, 2 held-out pairs", "")
    between = [*rows, *pair("bad 0", "awful 0")]  # rejected here, chosen there: three answers in their order
    assert labels.repeated(Case(None, training=between))[:2] == (
        "ok",
        "0 of 51 pairs repeat another, 0 are also there the other way round",
    )
    level, message, fix = labels.repeated(Case(None, training=[*rows, *pair("bad 0", "Good 0")]))
    assert level == "fail" and "2 are also there the other way round" in message and "nothing can be learned" in fix


WORDS = (["great", "warm", "fine"], ["boring", "dull", "stupid"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_policy(folder / "base")
    for name, count, shift in (("train", 120, 0), ("test", 40, 1000)):
        rows = []
        for i in range(count):
            good, bad = (words[i % 3] for words in WORDS)
            rows.append({"prompt": f"Film {i + shift}:", "chosen": f" a {good} story", "rejected": f" a {bad} story"})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def flags(world: Path, output: Path, **changes: Any) -> list[str]:
    settings = {
        "model": world / "base",
        "data": world / "train.jsonl.gz",
        "test_data": world / "test.jsonl.gz",
        "output": output,
        "excerpts": 320,
        "excerpt_tokens": "[2, 6]",
        "probe_excerpts": 40,
        "batch_size": 16,
        "lora.rank": 4,
        "optim.lr": 0.01,
        "dtype": "float32",
        "device": "cpu",
    }
    return [str(word) for name, value in (settings | changes).items() for word in (f"--{name}", value)]


@torch.no_grad()
def by_hand(folder: Path, texts: list[str]) -> list[float]:
    """Return R of whole texts, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(folder)
    found = [model(torch.tensor([tokens(text)["input_ids"]])).logits[0] for text in texts]
    return [float(logits[1] - logits[0]) for logits in found]


def test_a_reward_model_learns_from_pairs(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward", *flags(world, tmp_path / "run")]) == 0
    losses = [row["loss/reward"] for row in tiny_runs.read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 20 and sum(losses[-5:]) < 0.6 * sum(losses[:5])
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["pairs"] == 40 and found["texts"] == 80 and found["accuracy"]["low"] > 0.8
    assert sum(one["count"] for one in found["calibration"]) == 80
    rows = labelled(str(world / "test.jsonl.gz"), pairs=True)
    scores = by_hand(tmp_path / "run" / "final", [row.text for row in rows])
    above = [a > b for a, b in zip(scores[::2], scores[1::2], strict=True)]
    assert sum(above) > 0.9 * len(above)
    stored = json.loads((tmp_path / "run" / "final" / "reward.json").read_text())
    assert stored == {"mean": found["score_mean"], "sd": found["score_sd"]}
    assert abs(stored["mean"] - float(np.mean(scores))) < 2 * stored["sd"]
    assert "Bradley–Terry" in (tmp_path / "run" / "final" / "README.md").read_text()
    assert "held-out accuracy" in capsys.readouterr().err


def test_micro_batches_and_their_padding_change_no_step_of_pairs(world: Path, tmp_path: Path) -> None:
    metrics = []
    for micro in (16, 5):
        words = flags(world, tmp_path / str(micro), excerpts=48, micro_batch=micro, probe_excerpts=0)
        assert main(["reward", *words]) == 0
        rows = tiny_runs.read_lines(tmp_path / str(micro) / "metrics.jsonl")
        metrics.append([row[name] for row in rows for name in ("loss/reward", "accuracy", "grad_norm")])
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3) and len(metrics[0]) == 9


def test_the_first_loss_is_that_of_the_pairs_by_hand(world: Path, tmp_path: Path) -> None:
    """Recomputed from the excerpts of the first batch with the untrained head's own logits."""
    config = RewardConfig(excerpts=8, excerpt_tokens=[2, 6], dtype="float32", device="cpu", probe_excerpts=0)
    tokens = tiny.tokenizer()
    rows = labelled(str(world / "train.jsonl.gz"), pairs=True)
    excerpts = random_cuts(token_ids(rows, tokens, config), 8, config.excerpt_tokens, 0)
    torch.manual_seed(0)
    model = inputs.classifier(config, str(world / "base"), tokens, torch.device("cpu"), excerpts)
    learner = RewardLearner(model, config.optim)
    sums = _accumulate(learner, excerpts, 3, 0)
    expected = []
    for one in excerpts:
        scores = []
        for ids in (one.chosen.ids, one.rejected.ids):  # each alone, without padding
            logits = model(torch.tensor([ids])).logits[0].detach()
            scores.append(float(logits[1] - logits[0]))
        expected.append(math.log1p(math.exp(scores[1] - scores[0])))
    assert float(sums["loss/reward"]) == pytest.approx(sum(expected) / 8, abs=1e-5)
    ids, mask, _ = right_pad(flat(excerpts), 0)
    assert ids.shape[0] == 16 and bool(mask.any(dim=1).all())


def test_columns_of_pairs_may_have_another_prompt(tmp_path: Path) -> None:
    row = {"question": "How?", "chosen": " Fine.", "rejected": " No."}
    layout = Layout(prompt_column="question")
    found = labelled(write(tmp_path / "a.jsonl", [row]), layout=layout, pairs=True)
    assert [one.text for one in found] == ["How? Fine.", "How? No."] and found[0].prompt == 4
