"""Faults injected into real runs of the real command: each fault is named, counted or ends the run, and the
current rollouts are saved."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from faulty import METHODS, REWARDS

from apportion.errors import ScoreError
from apportion.report.page import write_report
from apportion.training.crash_dump import BatchSnapshot, CrashDump
from apportion.training.nonfinite import SkippedUpdates
from apportion.training.run_folder import RunFolder
from apportion.user_code import UserCode

Command = Callable[..., Any]
SHAPE = re.compile(r"apportion: [^\n]+: got [^\n]+; expected [^\n]+\. [^\n]+\n")


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of the modules above."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "methods.py").write_text(METHODS)
    return str(folder)


@pytest.fixture
def rl(model_command: Command, rl_flags: list[str], mine: str) -> Command:
    """Return `apportion rl` on the tiny world; keywords are flags."""

    def run(*more: object, **flags: object) -> Any:
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        return model_command("rl", *rl_flags, *words, *more, PYTHONPATH=mine)

    return run


def by(function: str, **more: object) -> str:
    """Return a credit chain with the process rewards of `function`."""
    return json.dumps([{"process": {"function": f"rewards:{function}", "keep": True} | more}, "kl_penalty"])


def estimator(how: str) -> dict[str, str]:
    return {"advantages": json.dumps({"methods:estimate": {"how": how}}), "compare": "[sparse]"}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_stopped(done: Any, *pieces: str) -> None:
    """Check exit code 2 and one message in the usual shape, with all `pieces`, after progress and warnings."""
    *before, last = done.err.splitlines(keepends=True)
    assert done.code == 2 and done.out == "" and all(line.startswith(("rl ", "warning: ")) for line in before), done.err
    assert SHAPE.fullmatch(last), last
    for piece in pieces:
        assert piece in last, (piece, last)
    assert not (done.folder / "run" / "final").exists()


def assert_saved(run: Path, step: int, *, columns: tuple[str, ...] = (), count: int = 4) -> list[dict[str, Any]]:
    """Check the rollouts of a stopped step, and that the run says where they are; return them."""
    place = run / "stopped" / f"step-{step}"
    saved = rows(place / "rollouts.jsonl")
    assert [(row["step"], row["row"]) for row in saved] == [(step, i) for i in range(count)]
    for row in saved:
        assert row["text"] and row["prompt"] and len(row["logprob"]) == len(row["response_ids"]) == 4
        assert all(len(row[name]) == 4 for name in columns), row.keys()
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "failed"
    assert (place / "error.txt").read_text().strip().split(" The rollouts are in ")[0] in status["error"]
    return saved


def test_a_nan_reward_at_batch_seven(rl: Command, tmp_path: Path) -> None:
    done = rl(steps=9, credit=by("nan_at_seven"))
    assert_stopped(
        done,
        "process rewards from rewards:nan_at_seven, number 1 of rollout 2: got nan; expected a finite number.",
        "A failure never becomes a reward",
        "The rollouts are in run/stopped/step-7.",
    )
    assert_saved(tmp_path / "run", 7)
    logged = rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(value) for row in logged for value in row.values())


def test_a_reward_model_that_returns_nan_at_batch_seven(rl: Command, tmp_path: Path) -> None:
    (tmp_path / "poison.py").write_text(
        "from apportion import credit\n\n"
        "def poisoned():\n"
        "    return credit.sparse()._replace(needs=frozenset({'rewards:poisons'}))\n"
    )
    done = rl(steps=9, credit="[poison:poisoned, kl_penalty]", compare="[sparse]")
    assert_stopped(done, "score of rollout 0: got nan; expected a finite number", "run/stopped/step-7")
    assert_saved(tmp_path / "run", 7)
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 6


def test_monitors_resume_their_state(rl: Command, tmp_path: Path) -> None:
    """A run that failed at its seventh batch and is resumed has the monitor state of an uninterrupted one, bitwise."""
    more = {"steps": 9, "checkpoint_every": 1, "optim.lr": 0.03}
    assert rl(credit=by("nan_at_seven"), **more).code == 2
    rl(credit=by("nan_at_seven"), **more).assert_done()  # the function counts from one again
    rl(credit=by("plain"), **more, output="whole").assert_done()
    parts, whole = (tmp_path / name for name in ("run", "whole"))
    state = "checkpoints/step-8/monitors.safetensors"
    assert (parts / state).read_bytes() == (whole / state).read_bytes()
    logs = [rows(run / "metrics.jsonl") for run in (parts, whole)]
    names = [name for name in logs[0][0] if name.startswith("monitors/")]
    assert len(names) == 9 and len(logs[0]) == 9
    assert [[row[name] for name in names] for row in logs[0]] == [[row[name] for name in names] for row in logs[1]]
    assert (parts / "stopped" / "step-7" / "rollouts.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "pieces"),
    [
        (
            {"credit": "[methods:mistaken: {how: nan}]"},
            ["credit from methods:mistaken of rollout 0, token 0: got nan"],
        ),
        (
            {"credit": by("plain"), "compare": "[sparse]", "advantages": "methods:estimate"},
            ["methods:estimate: got", "KeyError", "no such table"],
        ),
        ({"credit": "[methods:mistaken]"}, ["methods:mistaken: got 'IndexError", "(methods.py, line"]),
        (estimator("leave"), ["methods:estimate: got 'SystemExit: 0 (methods.py, line "]),
        (estimator("tuple"), ["advantages (advantages): got 'methods:estimate, which returned a tuple'", "(4, 4)"]),
        (estimator("narrow"), ["advantages (advantages): got 'methods:estimate, which returned torch.float32 (4, 3)"]),
        (estimator("flat"), ["advantages (returns): got 'methods:estimate, which returned torch.float32 (4,)"]),
        (estimator("whole"), ["advantages (advantages): got 'methods:estimate, which returned torch.int64 (4, 4)"]),
        (estimator("nan"), ["returns of rollout 2, token 1: got nan; expected a finite number"]),
        (estimator("bare stats"), ["advantages (stats mine): got", "expected {name: (sum, count)}"]),
        (estimator("infinite stats"), ["mine at step 1: got ", "expected a finite number. The training diverged"]),
        (
            {"loss": "methods:broken_loss"},
            ["methods:broken_loss: got 'ZeroDivisionError: division by zero in my loss (methods.py, line "],
        ),
    ],
)
def test_methods_of_the_users_that_fail(rl: Command, tmp_path: Path, flags: dict[str, str], pieces: list[str]) -> None:
    done = rl(**flags)
    assert_stopped(done, *pieces, "run/stopped/step-1")
    assert_saved(tmp_path / "run", 1)
    if "Error" in pieces[-1]:
        trace = (tmp_path / "run" / "stopped" / "step-1" / "traceback.txt").read_text()
        assert trace.startswith("Traceback") and "methods.py" in trace


def test_evidence_of_the_users_that_is_not_finite(rl: Command, tmp_path: Path, mine: str) -> None:
    (tmp_path / "more.py").write_text(
        "from apportion import credit\n\ndef more():\n"
        "    return credit.sparse()._replace(needs=frozenset({'rewards:infinite'}))\n"
    )
    done = rl(credit="[more:more]")
    assert_stopped(done, "evidence['rewards:infinite'] of rollout 0: got inf", "run/stopped/step-1")
    assert_saved(tmp_path / "run", 1)


def test_infinite_gradients_are_skipped_and_counted(rl: Command, tmp_path: Path) -> None:
    chosen = json.dumps({"methods:infinite": {"updates": [3, 4, 7]}})
    done = rl(**{"loss": chosen, "steps": 4, "ppo.epochs": 2})
    done.assert_done()
    logged = rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["monitors/skipped_updates"] for row in logged] == [0, 2, 0, 1]
    # none of the second batch's two updates was taken: there is no loss to report
    assert ["loss/policy" in row for row in logged] == [True, False, True, True]
    assert "warning: monitor max_skipped at step 2: updates skipped as not finite: 2" in done.err
    assert done.err.count("warning: monitor max_skipped") == 2
    assert not (tmp_path / "run" / "stopped").exists()


@pytest.mark.parametrize("loss", [True, False])
def test_too_many_in_a_row_stop_the_run(rl: Command, tmp_path: Path, loss: bool) -> None:
    chosen = json.dumps({"methods:infinite": {"updates": list(range(2, 99)), "loss": loss}})
    done = rl(**{"loss": chosen, "steps": 9, "monitors.max_skipped": 4})
    what = "loss" if loss else "norm of the gradient"
    warned = [f"warning: monitor max_skipped at step {n}: updates skipped as not finite: 1\n" for n in (2, 3, 4)]
    assert_stopped(
        done,
        f"{what} of 4 updates in a row (monitors.max_skipped): got",
        "expected finite numbers. Likely causes: a learning rate too large",
        "The rollouts are in run/stopped/step-5.",
    )
    assert all(warning in done.err for warning in warned)
    columns = ("advantage", "return", "reward", "credit", "ratio", "old_logprob")
    saved = assert_saved(tmp_path / "run", 5, columns=columns)
    assert all(row["skipped"] and math.isfinite(row["score"]) for row in saved)
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 4
    if loss:
        page = write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
        assert "stopped/step-5: loss of 4 updates in a row" in page and "(4 rollouts saved)" in page
        assert "3 updates were skipped" in page and '{"step":5,"rollouts":[{' in page  # the heat maps have them


WILD = {"steps": 4, "optim.lr": 30.0, "optim.warmup": 0.0, "ppo.epochs": 4}


def test_an_exploding_ratio_is_reported_once_and_stops_a_run_set_to_stop(rl: Command, tmp_path: Path) -> None:
    others = {f"monitors.{name}": "off" for name in ("kl", "entropy", "value_loss", "negative_kl", "reward")}
    done = rl(**WILD, **others)
    done.assert_done()
    logged = rows(tmp_path / "run" / "metrics.jsonl")
    assert logged[0]["policy/approxkl"] > 0.5 and logged[0]["monitors/ratio"] == 1
    assert (
        done.err.count("warning: monitor ratio at step 1: got 'policy/") == 1 and done.err.count("monitor ratio") == 1
    )
    assert "Likely causes: steps too large" in done.err and "monitors/kl" not in logged[0]
    reported = json.loads((tmp_path / "run" / "status.json").read_text())["monitors"]
    assert reported["ratio"]["step"] == 1 and reported["ratio"]["episodes"] == 1
    done = rl("--fresh", **WILD, **others, **{"monitors.ratio": "stop"})
    assert done.code == 2 and "Traceback" not in done.err and done.out == ""
    assert re.search(
        r"\napportion: monitor ratio at step 1: got .* The rollouts are in run/stopped/step-1\.\n$", done.err
    )
    saved = assert_saved(tmp_path / "run", 1, columns=("ratio", "advantage", "credit", "reward"))
    assert max(abs(math.log(r)) for row in saved for r in row["ratio"]) > 2
    assert json.loads((tmp_path / "run" / "stopped" / "step-1" / "metrics.json").read_text())["policy/approxkl"] > 0.5


def test_a_stopped_run_resumes_under_another_monitor(rl: Command, tmp_path: Path) -> None:
    settings = WILD | {"monitors.kl": "off", "monitors.entropy": "off", "monitors.negative_kl": "off"}
    assert rl(**settings, **{"monitors.ratio": "stop"}).code == 2
    rl(**settings, **{"monitors.ratio": "warn"}).assert_done()


def test_a_kl_that_explodes_tightens(rl: Command, tmp_path: Path) -> None:
    done = rl(
        **WILD | {"steps": 6}, **{"monitors.kl": "raise_kl_coef", "credit": "[attention, kl_penalty: {coef: 0.1}]"}
    )
    done.assert_done()
    logged = rows(tmp_path / "run" / "metrics.jsonl")
    fired = [row["monitors/kl"] for row in logged]
    assert 1.0 in fired and "κ is raised while it fires" in done.err
    first = fired.index(1.0)
    assert logged[first]["monitors/raised_kl_coef"] == 1
    assert logged[first + 1]["kl/coef"] == pytest.approx(1.1 * logged[first]["kl/coef"], rel=1e-5)


def test_a_healthy_run_raises_no_alert(rl: Command, tmp_path: Path) -> None:
    done = rl(**{"steps": 8, "optim.lr": 0.001, "ppo.epochs": 2})
    done.assert_done()
    assert "monitor" not in done.err
    names = {"negative_kl", "sampler_gap", "ratio", "entropy", "length", "reward", "value_loss", "kl"}
    for row in rows(tmp_path / "run" / "metrics.jsonl"):
        reported = {name: value for name, value in row.items() if name.startswith("monitors/")}
        assert reported == {f"monitors/{name}": 0.0 for name in names | {"skipped_updates"}}


def test_a_reward_function_that_raises(rl: Command, tmp_path: Path) -> None:
    done = rl(credit=by("raises"))
    assert_stopped(
        done,
        r"rewards:raises: got 'ConnectionError: the reward service\nis down (rewards.py, line 21)'; "
        "expected a result without an exception.",
        "run/stopped/step-2",
    )
    assert_saved(tmp_path / "run", 2)
    trace = (tmp_path / "run" / "stopped" / "step-2" / "traceback.txt").read_text()
    assert trace.startswith("Traceback") and 'rewards.py", line' in trace and "ConnectionError" in trace


def test_a_reward_function_that_ends_the_process(rl: Command, tmp_path: Path) -> None:
    assert_stopped(
        rl(credit=by("leaves")), "rewards:leaves: got 'SystemExit: 0 (rewards.py, line ", "run/stopped/step-1"
    )
    assert_saved(tmp_path / "run", 1)


def test_a_reward_function_that_retries_for_ever(rl: Command, tmp_path: Path) -> None:
    done = rl(credit=by("retries"), **{"monitors.timeout": 0.5})
    assert_stopped(done, "rewards:retries: got 'no answer after 0.5 s'", "(monitors.timeout)", "run/stopped/step-2")
    assert_saved(tmp_path / "run", 2)
    assert "time.sleep(30)" in (tmp_path / "run" / "stopped" / "step-2" / "traceback.txt").read_text()


def test_a_reward_function_that_hangs_in_c(rl: Command, tmp_path: Path) -> None:
    done = rl(credit=by("hangs_in_c"), **{"monitors.timeout": 0.5})
    assert done.code in (-9, 137) and done.out == "" and "Traceback" not in done.err
    named = (
        r"apportion: rewards:hangs_in_c: got 'no answer after 0.5 s'; expected [^\n]+ It hung in code that cannot be "
    )
    assert re.search(named + r"interrupted\. The rollouts are in run/stopped/step-2\.\n$", done.err), done.err
    assert_saved(tmp_path / "run", 2)
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 1
    if Path("/proc/self/fd").exists():
        trace = (tmp_path / "run" / "stopped" / "step-2" / "traceback.txt").read_text()
        assert "in hangs_in_c" in trace and 'rewards.py", line' in trace


STEPS = {"process": {"function": "rewards:plain", "keep": True, "unit": "step"}}


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"credit": "[methods:slow_credit: {at: 2}]"}, "methods:slow_credit"),  # in the log of a batch
        ({"credit": "[methods:slow_credit: {part: stats}]"}, "methods:slow_credit"),
        ({"credit": "[methods:slow_credit: {part: update}]"}, "methods:slow_credit"),
        (
            {
                "algorithm": "abc-rloo",
                "credit": "[methods:slow_credit: {part: share}]",
                "sampling.samples_per_prompt": 2,
            },
            "methods:slow_credit",
        ),
        (estimator("slow stats"), "methods:estimate"),
        ({"segments": "methods:slow", "credit": json.dumps([STEPS])}, "methods:slow"),  # in the evidence
        ({"segments": "methods:slow", "credit": "[shapley: {spans: segments}]"}, "methods:slow"),
        ({"segments": "methods:slow", "algorithm": "vineppo"}, "methods:slow"),
    ],
)
def test_every_call_has_its_time(rl: Command, tmp_path: Path, flags: dict[str, Any], name: str) -> None:
    done = rl(**{"monitors.timeout": 0.5, "compare": "[]"} | flags)
    assert_stopped(done, f"{name}: got 'no answer after 0.5 s'", "run/stopped/step-1")
    assert_saved(tmp_path / "run", 1)
    assert "time.sleep(30)" in (tmp_path / "run" / "stopped" / "step-1" / "traceback.txt").read_text()


def test_a_credit_that_is_only_compared_is_left_out_when_it_is_slow(rl: Command, tmp_path: Path) -> None:
    done = rl(credit="[sparse]", compare="[methods:slow_credit, sparse]", **{"monitors.timeout": 0.5})
    assert done.code == 0, done.err
    line = "compare: methods:slow_credit is left out of the log where it fails (compare/left_out counts)"
    assert done.err.count(f"{line}: methods:slow_credit: got 'no answer after 0.5 s'") == 1
    batches = rows(tmp_path / "run" / "metrics.jsonl")
    assert len(batches) > 1 and all(batch["compare/left_out"] == 1 for batch in batches)  # not tried again
    assert set(rows(tmp_path / "run" / "rollouts.jsonl")[-1]["methods"]) == {"sparse"}


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("credit", [STEPS, {"shapley": {"spans": "segments"}}])
def test_ids_that_the_evidence_reads_are_checked(
    rl: Command, tmp_path: Path, credit: dict[str, Any], listed: bool
) -> None:
    chosen = json.dumps({"methods:uneven": {"listed": listed}})
    done = rl(credit=json.dumps([credit]), segments=chosen, **{"scores.micro_batch": 1, "compare": "[]"})
    wrong = (
        ["segments", "got 'list'; expected int64"]
        if listed
        else ["segments of rollout 2, token 0: got", "0 on the row's first token"]
    )
    assert_stopped(done, *wrong, "run/stopped/step-1")
    assert_saved(tmp_path / "run", 1)


def test_the_first_error_is_reported_when_the_rollouts_cannot_be_saved(tmp_path: Path) -> None:
    rollouts = tiny_runs.rollouts_of([[2, 3], [4]], [[5, 6, 7], [8, 9]])
    run = RunFolder.open(str(tmp_path / "run"), "rl", {})
    dump = CrashDump(run, tiny_runs.tiny.tokenizer(), UserCode(), {}, SkippedUpdates(), {})

    def fails() -> None:
        with dump.on_error(BatchSnapshot(1, rollouts, columns={"reward": torch.zeros(1, 1)})):
            raise ScoreError("the first error.")

    with pytest.raises(ScoreError) as caught:
        fails()
    assert re.fullmatch(r"the first error\. The rollouts could not be saved \(IndexError: .*\)\.", str(caught.value))


@pytest.mark.parametrize(
    ("flags", "pieces"),
    [
        ({"monitors.kl": "loud"}, ["monitors.kl: got 'loud'", "off, warn, stop, raise_kl_coef"]),
        (
            {"monitors.ratio": "raise_kl_coef"},
            ["monitors.ratio: got 'raise_kl_coef'; expected one of off, warn, stop."],
        ),
        ({"monitors.max_skipped": 0}, ["monitors.max_skipped: got 0", "a whole number >= 1"]),
        ({"monitors.timeout": -1}, ["monitors.timeout: got -1", "seconds > 0, or null"]),
        ({"monitors.klaxon": "warn"}, ["Did you mean", "--monitors.kl"]),
        (
            {"monitors.kl": "raise_kl_coef", "credit": "[sparse]"},
            ["monitors.kl: got 'raise_kl_coef'", "add kl_penalty to --credit"],
        ),
        (
            {"monitors.length": "raise_kl_coef", "credit": "[sparse, kl_penalty: {coef: 0}]"},
            ["monitors.length: got 'raise_kl_coef'", "no kl_penalty with a coefficient above 0"],
        ),
    ],
)
def test_settings_are_checked_before_models(command: Command, flags: dict[str, Any], pieces: list[str]) -> None:
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command("rl", "--reward_model", "x", *words).assert_refused_early(*pieces)


def test_off_in_yaml_is_a_word(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("monitors: {entropy: off, kl: stop}\nreward_model: x\n")
    done = command("rl", "--config", "a.yaml", "--monitors.reward", "off", "--dry_run")
    done.assert_done()
    assert "entropy: 'off'" in done.out and "kl: stop" in done.out and "reward: 'off'" in done.out


def test_help_explains_them(command: Command) -> None:
    done = command("rl", "--help")
    assert done.code == 0 and done.loads_nothing
    text = " ".join(done.out.split())
    assert "--monitors.entropy" in text and "the policy's entropy collapses" in text
    assert "Each monitor: off, warn, stop, or raise_kl_coef (kl, entropy, length, reward)" in text
