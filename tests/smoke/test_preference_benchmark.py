"""The comparison of reward models on preferences: its cuts, folds and figures, without a training run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import tiny
from benchmarks.reward_preferences import __main__ as command
from benchmarks.reward_preferences import figures, pairs

from apportion.errors import ConfigError
from apportion.models.tokenizers import load_tokenizer
from apportion.stages.reward.ranked_evaluation import Pair

ROWS = [
    {"prompt": f"a story about {number % 5}", "chosen": "one two three", "rejected": f"four {number}"}
    for number in range(40)
]


def test_no_prompt_is_in_training_and_test_and_every_pair_is_tested_once() -> None:
    tested = []
    for fold in range(3):
        training, test = pairs.split(ROWS, fold, 3)
        assert not {row["prompt"] for row in training} & {row["prompt"] for row in test}
        assert len(training) + len(test) == len(ROWS)
        tested += test
    assert sorted(row["rejected"] for row in tested) == sorted(row["rejected"] for row in ROWS)


def test_answers_are_cut_but_their_lengths_are_whole(tmp_path: Path) -> None:
    folder = tiny.save_policy(tmp_path / "policy")
    tokenizer = load_tokenizer("--model", folder)
    rows = [
        {"prompt": "so it went", "chosen": "a b c d e f", "rejected": "b c"},
        {"prompt": "so it went", "chosen": "a b c d e f", "rejected": "b c d e f"},  # equal to the first once cut
        {"prompt": "so it went", "chosen": "a b c d e f", "rejected": "a b c d"},  # equal answers once cut
    ]
    size = len(tokenizer("b c", add_special_tokens=False)["input_ids"])
    options = argparse.Namespace(model=str(folder), answer_tokens=size, prompt_tokens=2)
    (short,) = pairs.short_rows(rows, options)
    whole = tuple(
        len(tokenizer(rows[0][name], add_special_tokens=False)["input_ids"]) for name in ("chosen", "rejected")
    )
    assert short["tokens"] == whole and whole[0] > size
    assert len(tokenizer(short["chosen"], add_special_tokens=False)["input_ids"]) <= size
    pair = Pair(prompt=0, score=1.0, longer=0, ranks=1, length=size)  # both fill the cut
    assert pairs.at_whole_length([pair], [short]) == [pair._replace(longer=whole[0] - whole[1], length=whole[0])]
    with pytest.raises(ValueError, match="longer than"):
        pairs.at_whole_length([], [short])


def test_the_figures_are_those_counted_by_hand() -> None:
    first = [Pair(0, 1.0, 5, 1, 10), Pair(0, -1.0, 1, 1, 10), Pair(1, 0.0, -1, 1, 10)]
    second = [Pair(0, 2.0, -4, 1, 8)]  # prompt 0 of another fold is another prompt
    found = figures.summary([first, second])
    assert found["accuracy"]["mean"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found["length_only"]["mean"] == pytest.approx((1 + 1 + 0 + 0) / 4)
    assert found["near"]["pairs"] == 2  # 1 of 10 tokens apart
    assert found["near"]["mean"] == pytest.approx(0.25)
    assert found["near_length_only"]["mean"] == pytest.approx(0.5)
    others = [[pair._replace(score=-1.0) for pair in first], second]
    paired = figures.difference([first, second], others)
    assert paired["mean"] == pytest.approx(1.5 / 4) and paired["low"] < paired["mean"] < paired["high"]
    same = figures.difference([first, second], [first, second])
    assert (same["low"], same["mean"], same["high"]) == (0, 0, 0)


def test_results_of_other_settings_are_refused_and_only_shared_folds_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    words = ["--data", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "out.json")]
    options = command._parser().parse_args(words)
    assert command.earlier(options) == {}
    options.output.write_text(json.dumps({"settings": command.settings(options), "models": {"ours fold 0": {}}}))
    assert set(command.earlier(options)) == {"ours fold 0"}
    with pytest.raises(ConfigError, match="--answer_tokens: got 7; expected 128"):
        command.earlier(command._parser().parse_args([*words, "--answer_tokens", "7"]))
    (tmp_path / "pairs.jsonl").write_text("{} \n")
    with pytest.raises(ConfigError, match="--data"):
        command.earlier(options)

    def run(fold: int, score: float) -> dict[str, object]:
        return {"fold": fold, "seconds": 1.0, "pairs": [[0, score, 9, 1, 10], [1, score, 9, 1, 10]]}

    figures.print_table({"ours": [run(0, 1.0), run(1, 1.0)], "trl": [run(2, -1.0), run(1, -1.0)]})
    out = capsys.readouterr().out
    assert "ours − trl over folds 1: 100.0%" in out and "(0): none" in out
