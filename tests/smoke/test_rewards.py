"""Rewards other than one reward model: functions in TRL's signature and rules, through the real command."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
import trl_rewards
import yaml
from commands import Server, server

from apportion.cli.main import main
from apportion.config import RLConfig
from apportion.errors import ConfigError, DataError, ScoreError, UserCodeError
from apportion.stages.method import build_method
from apportion.stages.rl.learner import make_learner
from apportion.stages.rl.train import train

GROUPS = {"algorithm": "grpo", "sampling.samples_per_prompt": 2, "sampling.batch_size": 6}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_runs.world(tmp_path_factory.mktemp("world"))
    rows = [
        json.loads(line) | {"number": i, "answer": str(i)} for i, line in enumerate(lines(folder / "prompts.jsonl"))
    ]
    (folder / "numbered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server("heavy", tmp_path_factory.mktemp("server")) as started:
        yield started


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def flags(world: Path, output: Path | str, rewards: Any, **changes: Any) -> list[str]:
    """Return the flags of a GRPO run on numbered prompts with these rewards and no reward model."""
    more = {"prompts": world / "numbered.jsonl", "rewards": json.dumps(rewards), "reward_model": "null"}
    return tiny_runs.flags(world, output, **GROUPS | more | changes)


def finished(
    world: Path, output: Path, rewards: Any, **changes: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run the command and return its metrics and its logged rollouts."""
    assert main(["rl", *flags(world, output, rewards, log_rollouts=6, **changes)]) == 0
    return tiny_runs.read_lines(output / "metrics.jsonl"), tiny_runs.read_lines(output / "rollouts.jsonl")


def test_a_run_with_a_function_loads_no_reward_model(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **more: Any) -> Any:
        raise AssertionError("a reward model was loaded")

    monkeypatch.setattr("apportion.stages.rl.models.load_reward", refuse)
    metrics, records = finished(world, tmp_path / "run", "trl_rewards:count_a")
    for record in records:
        assert record["raw_score"] == record["score"] == record["rewards"]["count_a"] == record["text"].count("a")
    one = [record["score"] for record in records if record["step"] == 1]
    assert metrics[0]["rewards/count_a/mean"] == pytest.approx(sum(one) / len(one))
    assert metrics[0]["objective/scores"] == metrics[0]["rewards/count_a/mean"]
    assert "attention" not in records[0]["methods"] and "uniform" in records[0]["methods"]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["reward_model"], config["rewards"]) == (None, "trl_rewards:count_a")


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        ({"regex": {"pattern": "(?s).*[ei].*"}}, lambda text: "e" in text or "i" in text),
        ({"json": {}}, lambda text: False),
        ({"exact": {"marker": ""}}, lambda text: False),
    ],
)
def test_a_run_with_a_rule(world: Path, tmp_path: Path, rule: Any, holds: Any) -> None:
    _, records = finished(world, tmp_path / "run", rule)
    name = next(iter(rule))
    assert [record["rewards"][name] for record in records] == [
        float(holds(record["text"].strip())) for record in records
    ]


def test_two_rewards_are_weighed_and_logged_apart(world: Path, tmp_path: Path) -> None:
    rewards = [
        {"trl_rewards:count_a": {"weight": 2.0, "name": "a"}},
        {"regex": {"pattern": "(?s).*e.*", "weight": -0.5}},
    ]
    metrics, records = finished(world, tmp_path / "run", rewards)
    for record in records:
        a, e = float(record["text"].count("a")), float("e" in record["text"])
        assert record["rewards"] == {"a": a, "regex": e} and record["score"] == 2 * a - 0.5 * e
    for row in metrics:
        parts = 2 * row["rewards/a/mean"] - 0.5 * row["rewards/regex/mean"]
        assert row["objective/scores"] == pytest.approx(parts, abs=1e-6)
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Reward: a" in page and "Reward: regex" in page


def test_a_reward_model_beside_a_rule_is_one_of_the_sum(world: Path, tmp_path: Path) -> None:
    rewards = [{str(world / "reward"): {"weight": 0.5, "name": "judge"}}, {"regex": {"pattern": "(?s).*e.*"}}]
    changes = {"algorithm": "abc", "sampling.samples_per_prompt": 1}
    _, records = finished(world, tmp_path / "run", rewards, **changes)
    assert (
        main(["rl", *tiny_runs.flags(world, tmp_path / "alone", log_rollouts=6, prompts=world / "numbered.jsonl")]) == 0
    )
    alone = tiny_runs.read_lines(tmp_path / "alone" / "rollouts.jsonl")
    for record, other in zip(records[:6], alone[:6], strict=True):  # the first batch is that of the same policy
        assert record["rewards"]["judge"] == pytest.approx(other["score"], abs=1e-6)
        assert record["score"] == pytest.approx(0.5 * other["score"] + float("e" in record["text"]), abs=1e-6)
        assert sum(record["credit"]) == pytest.approx(record["score"], abs=1e-5)
        assert record["alpha"] == other["alpha"]


def test_prefix_scores_are_in_the_units_of_the_weighted_sum(world: Path, tmp_path: Path) -> None:
    rewards = [{str(world / "reward"): {"weight": -2.0, "name": "judge"}}, {"regex": {"pattern": "(?s).*e.*"}}]
    changes = {"algorithm": "red", "sampling.samples_per_prompt": 1}
    _, records = finished(world, tmp_path / "run", rewards, **changes)
    plain = tiny_runs.flags(
        world, tmp_path / "alone", log_rollouts=6, prompts=world / "numbered.jsonl", algorithm="red"
    )
    assert main(["rl", *plain]) == 0
    for record, other in zip(records[:6], tiny_runs.read_lines(tmp_path / "alone" / "rollouts.jsonl")[:6], strict=True):
        assert record["credit"][:-1] == pytest.approx([-2.0 * one for one in other["credit"][:-1]], abs=1e-5)
        assert sum(record["credit"]) == pytest.approx(record["score"], abs=1e-5)


def test_two_reward_models(world: Path, tmp_path: Path) -> None:
    tiny.save_reward(tmp_path / "second", seed=5)
    rewards = [{str(world / "reward"): {"name": "one"}}, {str(tmp_path / "second"): {"name": "two"}}]
    _, records = finished(world, tmp_path / "run", rewards)
    second = tiny_runs.judge(tmp_path, "second")
    for record in records:
        ids = torch.tensor([record["prompt_ids"] + record["response_ids"]])
        assert record["rewards"]["two"] == pytest.approx(
            float(second.score(ids, torch.ones_like(ids).bool())[0]), abs=1e-5
        )
        assert record["score"] == pytest.approx(sum(record["rewards"].values()), abs=1e-5)


def test_functions_get_prompts_completions_ids_and_columns(world: Path, tmp_path: Path) -> None:
    trl_rewards.SEEN.clear()
    _, records = finished(world, tmp_path / "run", "trl_rewards:seen", steps=1)
    (given,) = trl_rewards.SEEN
    assert set(given) == {"prompts", "completions", "completion_ids", "number", "answer"}
    assert given["prompts"] == [record["prompt"] for record in records]
    assert given["completions"] == [record["text"] for record in records]
    assert given["completion_ids"] == [record["response_ids"] for record in records]
    assert all(isinstance(one, int) for one in given["number"]) and list(map(str, given["number"])) == given["answer"]
    rows = [json.loads(line) for line in lines(world / "numbered.jsonl")]
    for prompt, number in zip(given["prompts"], given["number"], strict=True):
        assert rows[number]["prompt"].startswith(prompt)


def test_conversations_reach_functions_as_messages(world: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "policy")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (tmp_path / "policy").mkdir(exist_ok=True)
        (tmp_path / "policy" / name).write_bytes((world / "policy" / name).read_bytes())
    tokenizer.save_pretrained(tmp_path / "policy")
    turns = [[{"role": "user", "content": f"Film {i}?"}] for i in range(3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in turns))
    trl_rewards.SEEN.clear()
    changes = {"policy": tmp_path / "policy", "prompts": tmp_path / "p.jsonl", "sampling.prompt_tokens": "null"}
    _, records = finished(world, tmp_path / "run", "trl_rewards:seen", steps=1, **changes)
    (given,) = trl_rewards.SEEN
    assert all(prompt in turns for prompt in given["prompts"])
    assert given["completions"] == [[{"role": "assistant", "content": record["text"]}] for record in records]


def test_coroutines_run_at_the_same_time(world: Path, tmp_path: Path) -> None:
    _, records = finished(world, tmp_path / "run", ["trl_rewards:first", "trl_rewards:second"])
    assert all(record["rewards"] == {"first": 1.0, "second": 2.0} and record["score"] == 3.0 for record in records)


def test_none_leaves_a_reward_out(world: Path, tmp_path: Path) -> None:
    metrics, records = finished(world, tmp_path / "run", ["trl_rewards:every_other", "trl_rewards:the_rest"])
    for place, record in enumerate(records[:6]):
        even, odd = (None, 3.0) if place % 2 else (1.0, None)
        assert record["rewards"] == {"every_other": even, "the_rest": odd} and record["score"] == (odd or even)
    assert metrics[0]["rewards/every_other/mean"] == 1.0 and metrics[0]["rewards/every_other/none"] == 0.5


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_list_of_numbers_is_paid_token_by_token(world: Path, tmp_path: Path, algorithm: str) -> None:
    rewards = ["trl_rewards:count_a", {"trl_rewards:per_token": {"weight": 0.5}}]
    metrics, records = finished(world, tmp_path / "run", rewards, algorithm=algorithm)
    for record in records:
        dense = [0.5 * (i % 2 == 0) for i in record["response_ids"]]
        expected = [*dense[:-1], dense[-1] + record["text"].count("a")]
        assert record["credit"] == pytest.approx(expected, abs=1e-5)
        assert record["score"] == pytest.approx(record["text"].count("a"), abs=1e-5)
        assert record["raw_score"] == pytest.approx(record["score"] + sum(dense), abs=1e-5)
    assert metrics[0]["objective/scores"] == pytest.approx(sum(r["raw_score"] for r in records[:6]) / 6, abs=1e-5)


def test_normalise_over_batch_and_over_groups(world: Path, tmp_path: Path) -> None:
    rewards = [
        {"trl_rewards:count_a": {"normalise": "batch", "name": "batch"}},
        {"trl_rewards:count_a": {"normalise": "group", "weight": 3, "name": "group"}},
    ]
    _, records = finished(world, tmp_path / "run", rewards)
    counts = torch.tensor([float(record["text"].count("a")) for record in records[:6]], dtype=torch.float64)

    def standard(x: torch.Tensor) -> torch.Tensor:
        sd = x.std(unbiased=False)
        return (x - x.mean()) / sd if sd > 1e-6 else torch.zeros_like(x)

    expected = standard(counts) + 3 * torch.cat([standard(pair) for pair in counts.split(2)])
    assert [record["score"] for record in records[:6]] == pytest.approx(expected.tolist(), abs=1e-5)
    assert [record["raw_score"] for record in records[:6]] == pytest.approx((4 * counts).tolist())


def test_fresh_rollouts_of_vine_are_scored_by_the_rule(world: Path, tmp_path: Path) -> None:
    changes = {
        "algorithm": "vineppo",
        "sampling.samples_per_prompt": 1,
        "advantages": "{vine: {samples: 2}}",
        "steps": 1,
    }
    _, records = finished(world, tmp_path / "run", {"regex": {"pattern": "(?s).*e.*"}}, **changes)
    assert {record["score"] for record in records} <= {0.0, 1.0}


def test_vine_refuses_a_reward_a_token(world: Path, tmp_path: Path) -> None:
    changes = {"algorithm": "vineppo", "sampling.samples_per_prompt": 1, "advantages": "{vine: {samples: 2}}"}
    with pytest.raises(ConfigError, match="a number a token, with vine"):
        train(parsed(flags(world, tmp_path / "run", "trl_rewards:per_token", **changes)))


def test_evaluate_scores_with_the_rewards_of_the_run(world: Path, tmp_path: Path) -> None:
    rewards = [{"regex": {"pattern": "(?s).*e.*"}}, "trl_rewards:takes_answer"]
    finished(world, tmp_path / "run", rewards, steps=2)
    words = ["--run", tmp_path / "run", "--prompts", world / "numbered.jsonl", "--count", 6, "--judge", "false"]
    assert main(["evaluate", *map(str, words), "--device", "cpu", "--dtype", "float32"]) == 0
    figures = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert 0 <= figures["reward_after"]["mean"] <= 2 and "reward_before" in figures
    samples = tiny_runs.read_lines(tmp_path / "run" / "samples.jsonl")
    rows = [json.loads(line) for line in lines(world / "numbered.jsonl")]
    for place, sample in enumerate(samples):
        assert sample["reward_after"] == float("e" in sample["after"]) + float(rows[place]["answer"] in sample["after"])


def test_the_one_reward_model_in_rewards_is_the_short_form(world: Path, tmp_path: Path) -> None:
    assert main(["rl", *tiny_runs.flags(world, tmp_path / "short")]) == 0
    long = {"rewards": world / "reward", "reward_model": "null"}
    assert main(["rl", *tiny_runs.flags(world, tmp_path / "long", **long)]) == 0
    drop = ("time/", "memory/")
    rows = [
        [
            {k: v for k, v in row.items() if not k.startswith(drop)}
            for row in tiny_runs.read_lines(tmp_path / n / "metrics.jsonl")
        ]
        for n in ("short", "long")
    ]
    assert rows[0] == rows[1]


def test_what_a_function_changes_of_its_arguments_reaches_no_other_call(world: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) | {"tags": ["a", "b"]} for line in lines(world / "prompts.jsonl")[:3]]
    (tmp_path / "tagged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = ["trl_rewards:changes_everything", "trl_rewards:tags_and_ids"]
    _, records = finished(world, tmp_path / "run", rewards, prompts=tmp_path / "tagged.jsonl")
    assert len(records) == 12  # two batches of the same three prompts
    for record in records:
        assert record["rewards"] == {"changes_everything": 2.0, "tags_and_ids": 2.0 + len(record["response_ids"])}


def test_what_a_function_changes_of_torch_ends_with_its_call(world: Path, tmp_path: Path) -> None:
    threads, folder = torch.get_num_threads(), Path.cwd()
    metrics, _ = finished(world, tmp_path / "run", "trl_rewards:changes_torch")
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert torch.get_default_device().type == "cpu" and not torch.are_deterministic_algorithms_enabled()
    assert (torch.get_num_threads(), Path.cwd()) == (threads, folder)
    assert all(row["policy/grad_norm"] > 0 for row in metrics)


def test_a_function_may_have_workers_of_its_own(world: Path, tmp_path: Path) -> None:
    """A pool is ended by SIGTERM, which is not for the run."""
    _, records = finished(world, tmp_path / "run", "trl_rewards:pooled", **{"monitors.timeout": 30})
    assert all(record["score"] == len(record["text"]) for record in records)


# failures: each names the function, and the rollout where it is one rollout's


@pytest.mark.parametrize(
    ("function", "kind", "pieces"),
    [
        ("too_few", DataError, ["the result of trl_rewards:too_few: got '5 rewards'", "a list of 6 rewards"]),
        ("mapping", DataError, ["got 'a dict'", "a list of 6 rewards"]),
        ("words", ScoreError, ["reward from trl_rewards:words of rollout 2: got 'good'", "a finite number"]),
        ("not_a_number", ScoreError, ["of rollout 1: got nan", "A failure never becomes a reward"]),
        ("short_list", ScoreError, ["of rollout 5: got '4 numbers'", "5 numbers, one a token"]),
        ("nothing", ScoreError, ["reward (nothing) of rollout 0: got None", "a number from at least one"]),
        ("too_large", ScoreError, ["of rollout 1: got 1e+39", "a finite number of at most 3.4e+38"]),
        ("cancelled", UserCodeError, ["reward trl_rewards:cancelled: got 'CancelledError"]),
        ("down", UserCodeError, ["reward trl_rewards:down: got 'ConnectionError: the service is down"]),
        ("hangs", UserCodeError, ["reward trl_rewards:hangs: got 'no answer after 1.0 s'", "monitors.timeout"]),
        ("hangs_later", UserCodeError, ["reward trl_rewards:hangs_later: got 'no answer after 1.0 s'"]),
    ],
)
def test_what_a_function_gets_wrong(world: Path, tmp_path: Path, function: str, kind: Any, pieces: list[str]) -> None:
    changes = {"monitors.timeout": 1.0}
    config = parsed(flags(world, tmp_path / "run", f"trl_rewards:{function}", **changes))
    with pytest.raises(kind) as caught:
        train(config)
    for piece in pieces:
        assert piece in str(caught.value)
    assert not (tmp_path / "run" / "final").exists()
    dumped = tiny_runs.read_lines(tmp_path / "run" / "stopped" / "step-1" / "rollouts.jsonl")
    assert len(dumped) == 6  # nothing is lost


@pytest.mark.parametrize("function", ["raises", "raises_later"])
def test_the_rollout_that_a_function_fails_for_is_named(world: Path, tmp_path: Path, function: str) -> None:
    config = parsed(flags(world, tmp_path / "run", f"trl_rewards:{function}"))
    with pytest.raises(UserCodeError, match="LookupError: no such answer") as caught:
        train(config)
    sound = parsed(flags(world, tmp_path / "other", "trl_rewards:count_a"))
    learner = make_learner(sound, build_method(sound))
    rollouts = learner.source.take(1)
    texts = [json.loads(line)["prompt"] for line in lines(world / "numbered.jsonl")]
    numbers = [
        next(i for i, t in enumerate(texts) if t == learner.prompts.prompts[p].content)
        for p in learner.prompts.places(1, 3)
    ]
    failing = [i for i, group in enumerate(rollouts.group.tolist()) if numbers[group] % 3 == 2]
    assert caught.value.row == failing[0]


def parsed(words: list[str]) -> RLConfig:
    from apportion.cli.arguments import parse

    return parse(RLConfig, "rl", words).config


@pytest.mark.parametrize(
    ("rewards", "changes", "pieces"),
    [
        ("trl_rewards:absent", {}, ["rewards: got 'trl_rewards:absent'", "has no attribute 'absent'"]),
        ("/my/rewards.py:short", {}, ["rewards: got '/my/rewards.py:short'", "Write rewards:short", "PYTHONPATH=/my"]),
        ("./my/rewards.py:short", {}, ["Write my.rewards:short", "the working folder"]),
        ("no_such:thing", {}, ["rewards: got 'no_such:thing'", "No module named 'no_such'"]),
        ("trl_rewards:positional", {}, ["trl_rewards:positional: got '(completions, /)'", "Remove the slash"]),
        ({"json": {"shcema": {}}}, {}, ["rewards.json", "Did you mean 'schema'?"]),
        ({"json": {"schema": {"type": "thing"}}}, {}, ["rewards.json.schema", "is not valid"]),
        ({"regex": {"pattern": "("}}, {}, ["rewards.regex.pattern: got '('"]),
        ({"regex": {}}, {}, ["rewards.regex", "a value for 'pattern'"]),
        ({"trl_rewards:count_a": {"weight": "two"}}, {}, ["rewards.trl_rewards:count_a.weight: got 'two'"]),
        ({"trl_rewards:count_a": {"normalise": "row"}}, {}, ["normalise: got 'row'", "batch, group or false"]),
        ({"trl_rewards:count_a": {"scale": 1}}, {}, ["rewards.trl_rewards:count_a: got 'scale'"]),
        (["json", "json"], {}, ["rewards: got ['json', 'json']", "a name of its own"]),
        (3, {}, ["rewards: got 3", "a reward model, a package.module:function, a rule"]),
        ([], {}, ["rewards: got []"]),
        ("json", {"algorithm": "abc"}, ["credit: got 'attention, and rewards without a reward model'", "grpo"]),
        ("json", {"algorithm": "red"}, ["credit: got 'prefix_difference"]),
        ("json", {"algorithm": "scar"}, ["credit: got 'shapley"]),
        ("json", {"algorithm": "ppo", "ppo.value_model": "reward"}, ["ppo.value_model: got 'reward'"]),
        ("json", {"scores.center": "true"}, ["scores.center/scale", "normalise: batch"]),
        ("json", {"compare": "[attention]"}, ["compare: got ['attention']"]),
        ({"json": {"normalise": "batch"}}, {"algorithm": "vineppo"}, ["normalise with vine"]),
        ("json", {"reward_model": "w/reward"}, ["reward_model: got 'w/reward'", "null where rewards are given"]),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(
    world: Path, tmp_path: Path, rewards: Any, changes: dict[str, Any], pieces: list[str], heavy: Server
) -> None:
    result = heavy.run("rl", *flags(world, "run", rewards, **changes), cwd=tmp_path)
    result.assert_refused(*pieces)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rewards", "prompts", "pieces"),
    [
        ("trl_rewards:takes_answer", "prompts.jsonl", ["no column 'answer'", "trl_rewards:takes_answer takes"]),
        ("exact", "prompts.jsonl", ["no column 'answer'"]),
        ({"tests": {"column": "answer"}}, "blank.jsonl", ["column 'answer' of prompt 2", "got None"]),
        ({"math": {}}, "blank.jsonl", ["column 'answer' of prompt 2", "a value in every row"]),
        ({"json": {"column": "answer"}}, "blank.jsonl", ["column 'answer' of prompt 1"]),
    ],
)
def test_columns_are_checked_before_models_are_loaded(
    world: Path, tmp_path: Path, rewards: Any, prompts: str, pieces: list[str]
) -> None:
    rows = [{"prompt": "What is it, then?", "answer": one} for one in ("assert True", None)]
    (world / "blank.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"prompts": world / prompts, "policy": world / "policy"}
    with pytest.raises(DataError) as caught:
        train(parsed(flags(world, tmp_path / "run", rewards, **changes)))
    for piece in pieces:
        assert piece in str(caught.value)


def test_a_dense_reward_cannot_be_normalised(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="normalise: got 'batch'; expected a number a completion"):
        train(parsed(flags(world, tmp_path / "run", {"trl_rewards:per_token": {"normalise": True}})))


def test_settings_of_one_reward_are_flags_too(world: Path, tmp_path: Path) -> None:
    words = [*flags(world, tmp_path / "run", "x"), "--rewards", "[json, 'trl_rewards:count_a']"]
    words += ["--rewards.fenced", "true", "--rewards.trl_rewards:count_a.weight", "0.5"]
    config = parsed(words)
    assert config.rewards == [{"json": {"fenced": True}}, {"trl_rewards:count_a": {"weight": 0.5}}]
    assert math.isclose(config.rewards[1]["trl_rewards:count_a"]["weight"], 0.5)
