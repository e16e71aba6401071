"""`apportion reward` on rankings: each completion computed once, a zero mean in every reader, honest accuracy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from apportion.cli.main import main
from apportion.config import PreferenceConfig, RewardConfig
from apportion.data.answers.rankings import read_rankings
from apportion.models.loading import load_classifier, prepared
from apportion.models.reward import RewardModel, load_reward
from apportion.models.saving import save_classifier
from apportion.stages.reward import inputs
from apportion.stages.reward.excerpts import RankedExcerpts, flat, right_pad
from apportion.stages.reward.learner import RewardLearner
from apportion.stages.reward.losses import micro_batches
from apportion.stages.reward.ranked import merged, summed_centring, summed_ranking_loss
from apportion.stages.reward.ranked_inputs import Encoder, ranked_splits
from apportion.stages.reward.train import _accumulate

WORDS = ["great", "fine", "so so", "dull", "stupid"]
CPU = torch.device("cpu")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rankings(count: int, shift: int = 0) -> list[dict[str, Any]]:
    """Return rankings of 2 to 5 completions in a shuffled order, the friendlier word first; some tied or not judged."""
    rows = []
    for i in range(count):
        order = torch.randperm(5, generator=torch.Generator().manual_seed(i + shift))[: 2 + i % 4].tolist()
        completions = [f" a {WORDS[j]} story" + ", and more" * ((i + j) % 3) for j in order]
        ranks: list[Any] = [sorted(order).index(j) + 1 for j in order]
        if i % 7 == 6:
            completions, ranks = [*completions, " nothing"], [*ranks, None]
        if i % 5 == 4:
            ranks = [min(rank, 2) if rank else rank for rank in ranks]
        rows.append({"prompt": f"Film {i + shift}:", "completions": completions, "ranks": ranks})
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_policy(folder / "base")
    write(folder / "train.jsonl", rankings(60))
    write(folder / "test.jsonl", rankings(24, 1000))
    return folder


SETTINGS: dict[str, Any] = {
    "batch_size": 8,
    "micro_batch": 8,
    "probe_excerpts": 0,
    "lora.rank": 4,
    "optim.lr": 0.02,
    "dtype": "float32",
    "device": "cpu",
    "preferences.epochs": 3,
}


def flags(world: Path, output: Path, **changes: Any) -> list[str]:
    given = {"model": world / "base", "data": world / "train.jsonl", "test_data": world / "test.jsonl"}
    settings = given | {"output": output} | SETTINGS | changes
    return [str(word) for name, value in settings.items() if value is not None for word in (f"--{name}", value)]


def config(world: Path, **changes: Any) -> RewardConfig:
    preferences = PreferenceConfig(**changes.pop("preferences", {}))
    given = {"model": str(world / "base"), "data": str(world / "train.jsonl"), "test_data": str(world / "test.jsonl")}
    return RewardConfig(**given | {"dtype": "float32", "device": "cpu", "preferences": preferences} | changes)


def texts(path: Path) -> list[str]:
    return [row["prompt"] + text for row in tiny_runs.read_lines(path) for text in row["completions"]]


def by_loader(folder: Path, given: list[str]) -> list[float]:
    reward = load_reward(str(folder), device="cpu")
    ids = [reward.tokenizer(text)["input_ids"] for text in given]
    return [float(reward.score(torch.tensor([one]), torch.ones(1, len(one)).bool())[0]) for one in ids]


@torch.no_grad()
def by_transformers(folder: Path, given: list[str]) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(folder)
    return [float(model(torch.tensor([tokens(text)["input_ids"]])).logits[0, 0]) for text in given]


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("ranked") / "run"
    assert main(["reward", *flags(world, output)]) == 0
    return output


def test_it_learns_and_reports_beside_length_alone(world: Path, trained: Path) -> None:
    losses = [row["loss/reward"] for row in tiny_runs.read_lines(trained / "metrics.jsonl")]
    assert len(losses) == 24 and sum(losses[-6:]) < 0.6 * sum(losses[:6])
    found = json.loads((trained / "evaluation.json").read_text())
    assert found["accuracy"]["low"] > found["length_only"]["mean"] and found["gain_over_length"]["low"] > 0
    assert (found["rankings"], found["prompts"]) == (24, 24) and found["texts"] == len(texts(world / "test.jsonl"))
    scores = iter(by_loader(trained / "final", texts(world / "test.jsonl")))
    right, pairs = 0, 0
    for row in read_rankings(str(world / "test.jsonl")):
        own = [next(scores) for _ in row.ranks]
        for a, one in enumerate(row.ranks):
            for b, other in enumerate(row.ranks):
                if one is not None and other is not None and one < other:
                    right, pairs = right + (own[a] > own[b]), pairs + 1
    assert found["pairs"] == pairs and found["accuracy"]["mean"] == pytest.approx(right / pairs, abs=1e-9)
    for groups in ("by_rank_gap", "by_score_gap", "by_length_difference"):
        assert sum(one["pairs"] for one in found[groups].values()) == pairs
        assert all({"accuracy", "length_only"} <= set(one) for one in found[groups].values())
    assert sum(one["count"] for one in found["calibration"]) == 2 * pairs and 0 <= found["ece"] <= 1
    assert -1 <= found["length_correlation_within_prompt"] <= 1


def test_the_mean_is_zero_through_our_loader_and_stored_for_others(world: Path, trained: Path) -> None:
    given = texts(world / "train.jsonl")
    ours, theirs = by_loader(trained / "final", given), by_transformers(trained / "final", given)
    assert abs(sum(ours) / len(ours)) < 1e-4
    stored = json.loads((trained / "final" / "config.json").read_text())["reward_mean"]
    assert abs(stored) > 1e-3 and theirs == pytest.approx([one + stored for one in ours], abs=1e-5)
    found = json.loads((trained / "evaluation.json").read_text())
    assert found["subtracted_mean"] == stored and found["subtracted_in"] == "reward_mean"
    card = (trained / "final" / "README.md").read_text()
    assert "R = logit." in card and "less `reward_mean` of config.json" in card
    assert json.loads((trained / "final" / "config.json").read_text())["id2label"] == {"0": "reward"}


def test_demonstrations_may_have_the_mean_instead(world: Path, tmp_path: Path) -> None:
    shown = [{"prompt": f"Film {i}:", "completion": f" a {WORDS[i % 2]} story"} for i in range(9)]
    path = write(tmp_path / "shown.jsonl", shown)
    words = flags(world, tmp_path / "run", **{"preferences.demonstrations": path, "preferences.epochs": 1})
    assert main(["reward", *words]) == 0
    ours = by_loader(tmp_path / "run" / "final", [row["prompt"] + row["completion"] for row in shown])
    assert abs(sum(ours) / 9) < 1e-4
    assert abs(sum(by_loader(tmp_path / "run" / "final", texts(world / "train.jsonl")))) > 0.1
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "Film"}])
    assert main(["reward", *flags(world, tmp_path / "bad", **{"preferences.demonstrations": bad})]) == 2


def test_a_head_with_a_bias_takes_the_mean_itself(world: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = BertConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, pad_token_id=0
    )
    AutoModelForSequenceClassification.from_config(settings).save_pretrained(tmp_path / "bert")
    tiny.tokenizer().save_pretrained(tmp_path / "bert")
    for rank in (0, 4):
        words = flags(world, tmp_path / f"run{rank}", model=tmp_path / "bert", **{"lora.rank": rank, "optim.lr": 0.003})
        assert main(["reward", *words]) == 0
        folder, given = tmp_path / f"run{rank}" / "final", texts(world / "train.jsonl")
        ours, theirs = by_loader(folder, given), by_transformers(folder, given)
        assert abs(sum(ours) / len(ours)) < 1e-4 and theirs == pytest.approx(ours, abs=1e-5)
        assert "reward_mean" not in json.loads((folder / "config.json").read_text())
        assert json.loads((tmp_path / f"run{rank}" / "evaluation.json").read_text())["subtracted_in"] == "bias"


def test_a_new_start_forgets_the_mean_of_the_old_head(trained: Path) -> None:
    folder = str(trained / "final")
    fresh: Any = load_classifier("model", folder, torch.float32, CPU, new_head=1)
    assert not hasattr(fresh.config, "reward_mean")
    kept: Any = load_classifier("model", folder, torch.float32, CPU)
    assert kept.config.reward_mean != 0


def prepared_batch(world: Path, count: int, **preferences: Any) -> tuple[Any, list[RankedExcerpts], RewardConfig]:
    settings = config(world, preferences=preferences, probe_excerpts=0)
    batch = ranked_splits(settings, tiny.tokenizer, None).training[:count]
    torch.manual_seed(0)
    return inputs.classifier(settings, str(world / "base"), tiny.tokenizer(), CPU, batch), batch, settings


@pytest.mark.parametrize("settings", [{}, {"ties": "half", "weight": "pair"}, {"loss": "plackett_luce"}])
def test_each_completion_is_computed_once_and_the_loss_is_that_of_the_pairs(world: Path, settings: Any) -> None:
    model, batch, given = prepared_batch(world, 12, **settings)
    learner = RewardLearner(model, given.optim)
    rows: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    sums = _accumulate(learner, batch, 7, 0, given.preferences)
    handle.remove()
    completions = flat(batch)
    assert sum(rows) == len(completions) < sum(len(one.completions) * (len(one.completions) - 1) for one in batch)
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    # by hand: every completion alone, every pair in a loop
    scores = [model(torch.tensor([one.ids])).logits[0, 0] for one in completions]
    total, count, start, right, pairs = torch.zeros(()), 0.0, 0, 0.0, 0
    for unit in batch:
        own = scores[start : start + len(unit.completions)]
        start += len(own)
        [ranks] = unit.ranks
        terms = []
        for a in range(len(own)):
            for b in range(len(own)):
                tied = ranks[a] == ranks[b] and a < b and settings.get("ties") == "half"
                if ranks[a] < ranks[b]:
                    terms.append(torch.log1p(torch.exp(own[b] - own[a])))
                    right, pairs = right + float(own[a] > own[b]), pairs + 1
                elif tied:
                    terms.append(
                        (torch.log1p(torch.exp(own[b] - own[a])) + torch.log1p(torch.exp(own[a] - own[b]))) / 2
                    )
        if settings.get("loss") == "plackett_luce":
            below = [[b for b in range(len(own)) if ranks[b] > ranks[a]] for a in range(len(own))]
            chosen = [torch.stack([own[i] for i in (a, *below[a])]).logsumexp(0) - own[a] for a in range(len(own))]
            total, count = total + torch.stack(chosen).sum(), count + 1
        elif settings.get("weight") == "pair":
            total, count = total + torch.stack(terms).sum(), count + len(terms)
        else:
            total, count = total + torch.stack(terms).mean(), count + 1
    (total / count).backward()
    assert float(sums["loss/reward"]) == pytest.approx(float((total / count).detach()), abs=1e-5)
    assert float(sums["accuracy"]) == pytest.approx(right / pairs)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradient[name], parameter.grad, atol=1e-5, rtol=1e-3)


def test_a_prompts_completions_stay_in_one_micro_batch(world: Path) -> None:
    _, batch, _ = prepared_batch(world, 30)
    parts = micro_batches(batch, torch.arange(len(batch)), 6)
    assert [i for part in parts for i in part.tolist()] == list(range(len(batch)))
    sizes = [sum(len(batch[i].completions) for i in part.tolist()) for part in parts]
    assert all(size <= 6 or len(part) == 1 for size, part in zip(sizes, parts, strict=True)) and max(sizes) > 4


def test_two_peoples_rankings_of_one_item_share_its_forwards(world: Path, tmp_path: Path) -> None:
    row = rankings(1)[0]
    rows = [row | {"annotator": name, "ranks": ranks} for name, ranks in (("ada", [1, 2]), ("bob", [2, 1]))]
    read = read_rankings(write(tmp_path / "a.jsonl", rows), make=Encoder(config(world), tiny.tokenizer, "data"))
    [unit] = merged(read)
    assert len(unit.completions) == 2 and unit.ranks == [(1.0, 2.0), (2.0, 1.0)] and unit.pairs == [(0, 1), (1, 0)]
    total, count = summed_ranking_loss(torch.tensor([1.0, 0.0]), [unit], PreferenceConfig())
    assert float(count) == 2 and float(total) == pytest.approx(math.log1p(math.exp(-1)) + math.log1p(math.exp(1)))


def test_margins_of_rows_are_used_unless_they_are_switched_off(world: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [rankings(1)[0] | {"ranks": [1, 2], "margins": [0.75, 0.25]}])
    [unit] = read_rankings(source, make=Encoder(config(world), tiny.tokenizer, "data"))
    for used, gap in ((True, 0.5), (False, 1.0)):
        total, _ = summed_ranking_loss(torch.tensor([1.0, 0.0]), [unit], PreferenceConfig(margins=used))
        assert float(total) == pytest.approx(math.log1p(math.exp(-gap)))


def test_auxiliary_centring_is_trls_for_pairs(world: Path) -> None:
    _, batch, _ = prepared_batch(world, 60)
    pairs = [unit for unit in batch if len(unit.completions) == 2]
    scores = torch.randn(2 * len(pairs), generator=torch.Generator().manual_seed(0))
    assert float(summed_centring(scores, pairs)) == pytest.approx(
        float(((scores[::2] + scores[1::2]) ** 2).sum()), rel=1e-5
    )
    model, batch, given = prepared_batch(world, 8, center_coef=0.5)
    learner = RewardLearner(model, given.optim)
    with_centring = _accumulate(learner, batch, 99, 0, given.preferences)["loss/reward"]
    without = _accumulate(learner, batch, 99, 0, PreferenceConfig())["loss/reward"]
    ids, mask, _ = right_pad(flat(batch), 0)
    extra = summed_centring(model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].detach(), batch) / 8
    assert float(with_centring - without) == pytest.approx(0.5 * float(extra), rel=1e-3)


def test_the_head_starts_small_or_from_the_probe(world: Path) -> None:
    heads = [load_classifier("model", str(world / "base"), torch.float32, CPU, new_head=1) for _ in range(40)]
    weights = torch.cat([head.get_submodule("score").weight for head in heads]).detach()
    assert weights.shape == (40, 32) and float(weights.std()) == pytest.approx(33**-0.5, rel=0.08)
    assert abs(float(weights.mean())) < 0.02
    settings = config(world, probe_excerpts=60)
    training = ranked_splits(settings, tiny.tokenizer, None).training
    probed = inputs.classifier(settings, str(world / "base"), tiny.tokenizer(), CPU, training).eval()
    right = pairs = 0
    for unit in training:
        own = [float(probed(torch.tensor([one.ids])).logits.detach()) for one in unit.completions]
        right, pairs = right + sum(own[a] > own[b] for a, b in unit.pairs), pairs + len(unit.pairs)
    assert right > 0.6 * pairs


def test_merged_adapters_judge_as_the_adapters_did(world: Path, tmp_path: Path) -> None:
    model, batch, _ = prepared_batch(world, 8)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn_like(parameter)
    tokens = tiny.tokenizer()
    save_classifier(model, tokens, str(world / "base"), tmp_path / "final", "card", lora=True, labels=1)
    merged_model = prepared(AutoModelForSequenceClassification.from_pretrained(tmp_path / "final", dtype=torch.float32))
    ids, mask, _ = right_pad(flat(batch), 0)
    one, two = (RewardModel(m.eval(), tokens).score(ids, mask)[0] for m in (model, merged_model))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_pairs_may_be_read_whole_and_parquet_is_the_same(world: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = []
    for i in range(40):
        pair = {"chosen": f" a {WORDS[i % 2]} story", "rejected": f" a {WORDS[3 + i % 2]} story"}
        rows.append({"prompt": f"Film {i}:"} | pair)
    write(tmp_path / "pairs.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rankings(40)), tmp_path / "ranked.parquet")
    for data in ("pairs.jsonl", "ranked.parquet"):
        words = flags(world, tmp_path / f"of-{data}", data=tmp_path / data, test_data=None)
        assert main(["reward", *words, "--preferences.whole", "true"]) == 0
        found = json.loads((tmp_path / f"of-{data}" / "evaluation.json").read_text())
        assert 0 < found["rankings"] < 20 and found["accuracy"]["mean"] > 0.6


def test_conversations_are_rendered_and_long_answers_cut(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = tiny.tokenizer()
    tokens.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    turn = [{"role": "user", "content": "How?"}]
    answers: list[Any] = ["Fine " * 40, "No"]
    turns = [[{"role": "assistant", "content": answer.strip()}] for answer in answers]
    source = write(
        tmp_path / "a.jsonl",
        [{"prompt": turn, "completions": given, "ranks": [1, 2]} for given in (["Fine " * 39 + "Fine", "No"], turns)],
    )
    encoder = Encoder(config(world, preferences={"max_tokens": 20}), lambda: tokens, "data")
    one, two = read_rankings(source, make=encoder)
    assert one.completions == two.completions and one.prompt == two.prompt
    prompt = len(tokens("<user>How?;<assistant>")["input_ids"])
    assert one.lengths[0] == 20 and len(one.completions[0].ids) == prompt + 20 and encoder.cut == 2
    assert tokens.decode(one.completions[1].ids) == "<user>How?;<assistant>No;"
    words = flags(world, tmp_path / "run", **{"preferences.max_tokens": 3, "preferences.epochs": 1})
    assert main(["reward", *words]) == 0
    assert "longer than preferences.max_tokens 3: they are cut" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "pieces"),
    [
        ({"completions": ["a"], "ranks": [1]}, ["line 61", "1 completion", "two or more"]),
        ({"ranks": ["1", "2"], "completions": ["a", "b"]}, ["line 61", "ranks[0] = '1' (str)"]),
        ({"prompt": "x" * 900, "completions": ["a", "b"], "ranks": [1, 2]}, ["line 61", "context of 128 tokens"]),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completions": ["b", "c"], "ranks": [1, 2]},
            ["chat template"],
        ),
    ],
)
def test_a_bad_ranking_ends_the_run_or_is_left_out(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], pieces: list[str]
) -> None:
    source = write(tmp_path / "a.jsonl", [*rankings(60), {"prompt": "Film x:"} | row])
    assert main(["reward", *flags(world, tmp_path / "run", data=source)]) == 2
    shown = capsys.readouterr().err
    assert all(piece in shown for piece in pieces), shown
    if "chat template" in pieces:
        return
    words = flags(world, tmp_path / "skip", data=source, **{"preferences.epochs": 1})
    assert main(["reward", *words, "--skip_bad_rows"]) == 0
    [logged] = tiny_runs.read_lines(tmp_path / "skip" / "bad_rows.jsonl")
    assert logged["where"].endswith("line 61")


def test_settings_that_would_be_ignored_are_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert main(["reward", *flags(world, tmp_path / "run", data=pairs)]) == 2
    shown = capsys.readouterr().err
    assert "preferences.epochs: got 3" in shown and "Pass --preferences.whole true" in shown
    tied = write(tmp_path / "tied.jsonl", [{"prompt": "a", "completions": ["b", "c"], "ranks": [1, 1]}])
    assert main(["reward", *flags(world, tmp_path / "tied", data=tied)]) == 2
    assert "0 with a pair to train on" in capsys.readouterr().err
