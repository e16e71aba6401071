"""`apportion evaluate --policies`: real tiny policies, their start, rewards and judges; figures recomputed plainly."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_comparison
import tiny_runs
import torch
from tiny_comparison import COUNT, JUDGES, TEMPERATURE, figures, flags
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from apportion.cli.arguments import parse
from apportion.cli.main import main
from apportion.config import EvaluateConfig
from apportion.errors import Interrupted
from apportion.intervals import clustered_mean, distinct
from apportion.stages.evaluate.comparison import likelihood, sampling
from apportion.stages.evaluate.comparison.compare import compare
from apportion.stages.evaluate.statistics.bootstrap import difference
from apportion.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_comparison.world(tmp_path_factory.mktemp("world"))


def config_of(world: Path, output: Path, *more: str) -> EvaluateConfig:
    given = flags(world, output, [world / "ppo", world / "other"], *JUDGES, *more)
    return parse(EvaluateConfig, "evaluate", given).config


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert main(["evaluate", *flags(world, output, [world / "ppo", world / "other"], *JUDGES)]) == 0
    return output


@torch.no_grad()
def token_logprobs(model: Any, prompt: list[int], ids: list[int]) -> list[float]:
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    logits[:, tiny_runs.PAD] = -torch.inf
    return logits.log_softmax(dim=-1)[torch.arange(len(ids)), ids].tolist()


def test_every_figure_is_recomputed_from_the_models(world: Path, whole: Path) -> None:
    found = figures(whole)
    assert (found["start"], found["policies"], found["prompts"]) == ("ending", ["ppo", "other"], COUNT)
    assert found["measures"] == ["reward", "judge/vowels", "judge/of_topic"]
    folders = {"ending": world / "ending", "ppo": world / "ppo" / "final", "other": world / "other"}
    models = {name: AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for name, f in folders.items()}
    reward = AutoModelForSequenceClassification.from_pretrained(world / "reward").eval()
    tokens = AutoTokenizer.from_pretrained(world / "ending")
    scores: dict[str, np.ndarray] = {}
    for name, model in models.items():
        rows = tiny_runs.read_lines(whole / "answers" / name / "samples.jsonl")
        prompts = [tokens(row["prompt"])["input_ids"] for row in rows]
        answers = [row["completion_ids"][0] for row in rows]
        start = [token_logprobs(models["ending"], p, ids) for p, ids in zip(prompts, answers, strict=True)]
        one, count = found["figures"][name], sum(map(len, answers))
        assert one["perplexity"]["mean"] == pytest.approx(math.exp(-sum(map(sum, start)) / count), rel=1e-4)
        assert one["distinct"] == {str(n): distinct(answers, n) for n in (1, 2, 3)}
        assert one["length"]["mean"] == pytest.approx(count / COUNT)
        assert one["cut"]["mean"] == pytest.approx(np.mean([ids[-1] != tiny_runs.EOS for ids in answers]))
        with torch.no_grad():
            pairs = [reward(torch.tensor([p + ids])).logits[0] for p, ids in zip(prompts, answers, strict=True)]
        scores[name] = np.array([float(row[1] - row[0]) for row in pairs])
        measured = one["measures"]["reward"]
        assert measured["mean"]["mean"] == pytest.approx(scores[name].mean(), abs=1e-4)
        if name == "ending":
            assert one["kl"] is None and "win_rate" not in measured
            continue
        own = [token_logprobs(model, p, ids) for p, ids in zip(prompts, answers, strict=True)]
        gaps = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(own, start, strict=True)]
        k1, lengths = list(map(sum, gaps)), list(map(len, gaps))
        assert one["kl"] == pytest.approx(clustered_mean(k1, [1] * COUNT), abs=1e-3)
        assert one["kl_token"] == pytest.approx(clustered_mean(k1, lengths), abs=1e-3)
        k3 = [sum(math.exp(-gap) - 1 + gap for gap in row) for row in gaps]
        assert one["kl_k3_token"]["mean"] == pytest.approx(sum(k3) / count, rel=1e-3)
        assert one["kl"]["mean"] > 0.3, "the policy did not move: nothing was told apart"
        gap = difference(scores[name], scores["ending"], 50, seed=1)
        assert measured["difference"] == pytest.approx(gap, abs=1e-3)
        expected = np.mean((scores[name] > scores["ending"]) + 0.5 * (scores[name] == scores["ending"]))
        assert measured["win_rate"]["mean"] == pytest.approx(expected)
        shares = measured["win_rate"]
        assert shares["win"] + shares["tie"] + shares["loss"] == pytest.approx(1.0)


def test_tables_against_each_other_and_by_bucket_are_of_the_same_scores(whole: Path) -> None:
    found = figures(whole)
    wins = found["wins"]["judge/vowels"]
    assert wins["ppo"]["ending"]["mean"] == found["figures"]["ppo"]["measures"]["judge/vowels"]["win_rate"]["mean"]
    assert wins["ppo"]["other"]["mean"] == pytest.approx(1 - wins["other"]["ppo"]["mean"])
    samples = tiny_runs.read_lines(whole / "samples.jsonl")
    rows = {row["bucket"]: row for row in found["buckets"]["rows"]}
    assert set(rows) == {"a", "b"} and all(row["prompts"] == COUNT // 2 for row in rows.values())
    for place, name in enumerate("ab"):
        own = [row["policies"]["ppo"]["scores"]["judge/of_topic"][0] for row in samples[place::2]]
        mean = rows[name]["figures"]["ppo"]["judge/of_topic"]["mean"]["mean"]
        assert mean == pytest.approx(np.mean(own)) and (mean <= 0) == (name == "b" or mean == 0)


def test_equal_answers_have_equal_scores_and_tie(world: Path, tmp_path: Path) -> None:
    """A copy of the start samples the start's answers: every prompt is a tie, and the KL is 0."""
    shutil.copytree(world / "ending", tmp_path / "copy")
    given = flags(world, tmp_path / "run", [tmp_path / "copy"], "--start", str(world / "ending"))
    assert main(["evaluate", *given, "--judges", "judges:vowels", str(world / "reward")]) == 0
    one = figures(tmp_path / "run")["figures"]["copy"]
    for measured in one["measures"].values():
        assert measured["win_rate"]["tie"] == 1.0 and measured["win_rate"]["mean"] == 0.5
        assert measured["length_controlled_win_rate"]["mean"] == 0.5
        assert measured["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert one["kl"] == pytest.approx({"mean": 0.0, "low": 0.0, "high": 0.0}, abs=1e-5)


class Stop(Exception):
    """The end of a comparison in its midst."""


@pytest.mark.parametrize("where", ["sampling", "sampled", "likelihood"])
def test_an_interrupted_comparison_ends_with_the_same_numbers(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    config = config_of(world, tmp_path / "run")

    def stop(*arguments: Any, **keywords: Any) -> Any:
        raise Stop

    def on_step(done: int, total: int, metrics: dict[str, float]) -> None:
        if (where == "sampling" and done == COUNT + 4) or (where == "sampled" and done == total):
            raise Stop

    with monkeypatch.context() as patched:
        if where == "likelihood":
            patched.setattr("apportion.stages.evaluate.comparison.compare.start_logprobs", stop)
        with pytest.raises(Stop):
            compare(config, on_step=on_step)
    assert RunFolder(tmp_path / "run", "evaluate").read("status.json")["status"] == "failed"
    answered = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "answers").glob("*/samples.jsonl")}
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "logprobs").glob("*")}
    assert answered and bool(written) == (where == "likelihood")
    compare(config)
    assert (tmp_path / "run" / "evaluation.json").read_bytes() == (whole / "evaluation.json").read_bytes()
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    first = tmp_path / "run" / "answers" / "ending" / "samples.jsonl"
    assert first.stat().st_mtime_ns == answered[first], "a finished policy was sampled again"
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())


def test_a_judge_that_fails_names_the_answer_and_the_same_command_resumes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags(world, tmp_path / "run", [world / "ppo"], "--judges", "judges:vowels", "judges:broken")
    monkeypatch.setenv("BROKEN_JUDGE", "1")
    assert main(["evaluate", *given]) == 2
    error = capsys.readouterr().err
    assert "reward judges:broken, answer 1 of ending to prompt" in error and "the judge is out" in error
    assert not (tmp_path / "run" / "evaluation.json").exists()
    assert not (tmp_path / "run" / "scores" / "judge.broken.jsonl").exists()
    kept = tmp_path / "run" / "scores" / "judge.vowels.jsonl"
    before = kept.stat().st_mtime_ns
    monkeypatch.delenv("BROKEN_JUDGE")
    assert main(["evaluate", *given]) == 0
    assert kept.stat().st_mtime_ns == before and figures(tmp_path / "run")["measures"][-1] == "judge/broken"


@pytest.mark.parametrize("judge", ["judges:nan", "judges:too_few"])
def test_a_judge_without_a_number_is_an_error(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], judge: str
) -> None:
    given = flags(world, tmp_path / "run", [world / "ppo"], "--judges", judge)
    assert main(["evaluate", *given]) == 2
    error = capsys.readouterr().err
    assert judge in error and ("nan" in error and "to prompt 8" in error if "nan" in judge else "a list of 1" in error)
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_a_signal_ends_it_between_batches_and_says_how_to_resume(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(world, tmp_path / "run")

    def on_step(done: int, total: int, metrics: dict[str, float]) -> None:
        if done == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        compare(config, on_step=on_step)
    assert caught.value.code == 143
    assert RunFolder(tmp_path / "run", "evaluate").read("status.json")["status"] == "interrupted"
    rows = tiny_runs.read_lines(tmp_path / "run" / "answers" / "ending" / "samples.jsonl")
    assert 4 <= len(rows) < COUNT


def test_a_finished_comparison_is_not_computed_again_and_other_settings_are_refused(
    world: Path, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (whole / "evaluation.json").stat().st_mtime_ns
    same = flags(world, whole, [world / "ppo", world / "other"], *JUDGES)
    assert main(["evaluate", *same]) == 0
    out = capsys.readouterr().out
    assert (whole / "evaluation.json").stat().st_mtime_ns == before
    assert "judge/vowels" in out and "win rate" in out and str(whole / "evaluation.html") in out
    assert main(["evaluate", *same, "--seed", "9"]) == 2
    assert "--fresh" in capsys.readouterr().err


def test_given_answers_need_no_policy_and_keep_their_log_probabilities(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers that a comparison sampled, given as files: the same figures, without a policy being loaded."""
    loaded: list[str] = []
    load = likelihood.load
    monkeypatch.setattr(likelihood, "load", lambda comparison, one: (loaded.append(one.name), load(comparison, one))[1])
    answers = whole / "answers"
    parts = [answers / "ppo", answers / "other" / "samples.jsonl"]
    given = flags(world, tmp_path / "run", parts, "--start", str(world / "ending"), "--rewards", str(world / "reward"))
    assert main(["evaluate", *given, *JUDGES]) == 0
    mine, theirs = figures(tmp_path / "run"), figures(whole)
    assert loaded == ["ending"] and mine["policies"] == ["ppo", "other"]
    for name in ("ppo", "other"):
        one, two = mine["figures"][name], theirs["figures"][name]
        assert one["answers"] == "given" and one["measures"] == two["measures"]
        assert one["kl"] == pytest.approx(two["kl"], abs=1e-3) and one["perplexity"] == two["perplexity"]
    assert not (tmp_path / "run" / "answers" / "ppo").exists()


def test_answers_without_ids_are_texts_and_their_kl_is_left_out_by_name(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    rows = tiny_runs.read_lines(whole / "answers" / "ppo" / "samples.jsonl")
    texts = [{"prompt": row["prompt"], "completions": ["some words", row["completions"][0] + "."]} for row in rows]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(texts)))
    given = flags(world, tmp_path / "run", [tmp_path / "mine.jsonl"], "--start", str(world / "ending"))
    assert main(["evaluate", *given, "--judges", "judges:length"]) == 0
    found = figures(tmp_path / "run")
    one = found["figures"]["mine"]
    assert one["kl"] is None and one["perplexity"]["mean"] > 1
    assert any(line.startswith("KL of mine: its file has no log-probabilities") for line in found["left_out"])
    assert one["measures"]["judge/length"]["prompts"] == COUNT and one["self_similarity_of_a_prompt"] is not None
    lengths = [np.mean([10, len(row["completions"][1])]) for row in texts]
    assert one["measures"]["judge/length"]["mean"]["mean"] == pytest.approx(np.mean(lengths))


def test_a_policy_with_another_tokenizer_is_compared_by_text_and_without_kl(world: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tiny.save_policy(tmp_path / "foreign", seed=3)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, "<pad>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")
    made.save_pretrained(tmp_path / "foreign")
    given = flags(world, tmp_path / "run", [tmp_path / "foreign", world / "ppo"], "--judges", "judges:vowels")
    assert main(["evaluate", *given]) == 0
    found = figures(tmp_path / "run")
    assert found["left_out"] == ["KL of foreign: its tokenizer is not the start's."]
    one = found["figures"]["foreign"]
    assert one["kl"] is None and one["perplexity"]["mean"] > 1 and one["measures"]["reward"]["win_rate"] is not None
    assert found["figures"]["ppo"]["kl"]["mean"] != 0


def test_several_rewards_have_a_weighted_sum_and_a_judge_may_not_apply(world: Path, tmp_path: Path) -> None:
    rewards = ["--rewards", str(world / "reward"), "{judges:vowels: {weight: -0.5}}", "--judges", "judges:sometimes"]
    given = flags(world, tmp_path / "run", [world / "other"], "--start", str(world / "ending"), *rewards)
    assert main(["evaluate", *given, "--sampling.samples_per_prompt", "2"]) == 0
    found = figures(tmp_path / "run")
    assert found["measures"] == ["reward", "reward/reward", "reward/vowels", "judge/sometimes"]
    samples = tiny_runs.read_lines(tmp_path / "run" / "samples.jsonl")
    for row in samples:
        scores = row["policies"]["other"]["scores"]
        for total, first, second in zip(*(scores[key] for key in found["measures"][:3]), strict=True):
            assert total == pytest.approx(first - 0.5 * second)
        for text, value in zip(row["policies"]["other"]["completions"], scores["judge/sometimes"], strict=True):
            assert value == (None if len(text) % 2 else len(text))
    known = sum(any(v is not None for v in row["policies"]["other"]["scores"]["judge/sometimes"]) for row in samples)
    assert found["figures"]["other"]["measures"]["judge/sometimes"]["prompts"] == known


def test_prompts_that_are_cut_are_the_same_text_for_everyone(world: Path, tmp_path: Path) -> None:
    given = flags(world, tmp_path / "run", [world / "other"], "--start", str(world / "ending"))
    assert main(["evaluate", *given, "--judges", "judges:vowels", "--sampling.prompt_tokens", "[3, 5]"]) == 0
    used = [row["prompt"] for row in tiny_runs.read_lines(tmp_path / "run" / "prompts.jsonl")]
    texts = [row["prompt"] for row in tiny_runs.read_lines(world / "held.jsonl")]
    tokens = AutoTokenizer.from_pretrained(world / "ending")
    assert all(text.startswith(cut) for text, cut in zip(texts, used, strict=True)) and used != texts
    assert all(3 <= len(tokens(cut)["input_ids"]) <= 6 for cut in used)
    for name in ("ending", "other"):
        rows = tiny_runs.read_lines(tmp_path / "run" / "answers" / name / "samples.jsonl")
        assert [row["prompt"] for row in rows] == used


def test_only_one_policy_is_in_memory_at_a_time(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    alive: list[Any] = []
    most: list[int] = []
    load = likelihood.frozen_policy

    def watched(*arguments: Any, **keywords: Any) -> Any:
        gc.collect()
        most.append(sum(one() is not None for one in alive) + 1)
        made = load(*arguments, **keywords)
        alive.append(weakref.ref(made.model))
        return made

    monkeypatch.setattr(likelihood, "frozen_policy", watched)
    monkeypatch.setattr("apportion.stages.sample.sample.frozen_policy", watched)
    compare(config_of(world, tmp_path / "run"))
    assert len(most) == 6 and max(most) == 1
    assert sampling.FOLDER == "answers"
