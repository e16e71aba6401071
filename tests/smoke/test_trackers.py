"""Trackers of real runs, read back by their own readers: the numbers of metrics.jsonl, nothing else, no network."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import tracked
import trainer_runs
from commands import Server, run_python

from apportion.cli.arguments import parse
from apportion.cli.main import main
from apportion.config import RLConfig, SFTConfig
from apportion.errors import ConfigError
from apportion.stages.rl import train as rl
from apportion.training.publish.trackers import check_trackers, hyperparameters
from apportion.training.session import training_session

wandb_needed = pytest.mark.skipif(
    not any((Path(p) / "wandb").is_dir() for p in sys.path), reason="wandb is not installed: pip install wandb"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainer_runs.world(tiny_runs.world(tmp_path_factory.mktemp("world")))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let no tracker use the network or the user's folders."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def words(world: Path, stage: str, run: Path, **changes: Any) -> list[str]:
    """Return the command line of a small run of `stage`."""
    if stage == "rl":
        return tiny_runs.flags(world, run, **changes)
    if stage == "reward":
        more = {"model": world / "base", "data": world / "reviews.csv", "output": run, "excerpts": 32, "batch_size": 8}
        more |= {"probe_excerpts": 8, "test_texts": 10, "excerpt_tokens": "[4, 8]", "dtype": "float32"}
        return [str(word) for name, value in (more | changes).items() for word in (f"--{name}", value)]
    data = world / ("demonstrations.jsonl" if stage == "sft" else "pairs.jsonl")
    return trainer_runs.flags(world, data, run, **changes)


def logged(run: Path) -> dict[str, dict[int, float]]:
    """Return {metric: {step: value}} of metrics.jsonl."""
    found: dict[str, dict[int, float]] = {}
    for row in tiny_runs.read_lines(run / "metrics.jsonl"):
        for name, value in row.items():
            if name != "step":
                found.setdefault(name, {})[row["step"]] = value
    return found


def assert_same(found: dict[str, dict[int, float]], run: Path) -> None:
    """Check that a tracker has each number of metrics.jsonl, in float32, and no other."""
    expected = logged(run)
    assert found.keys() == expected.keys() and len(expected) > 5
    for name, values in expected.items():
        assert found[name].keys() == values.keys(), name
        assert all(math.isclose(found[name][s], v, rel_tol=1e-6, abs_tol=1e-30) for s, v in values.items()), name


@pytest.mark.parametrize("stage", ["rl", "reward", "sft", "dpo"])
def test_tensorboard_holds_every_number_of_every_stage(
    world: Path, tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([stage, *words(world, stage, run, trackers="tensorboard")]) == 0
    assert capsys.readouterr().out == f"{run}\n"
    assert_same(tracked.scalars(run / "tensorboard"), run)
    [settings] = (run / "tensorboard").glob("*/hparams.yml")
    assert "seed: 0" in settings.read_text() and "optim.lr: 0.0" in settings.read_text()
    state = json.loads((run / "trackers.json").read_text())
    assert state.keys() == {"tensorboard"} and "failures" not in state["tensorboard"]


@wandb_needed
def test_wandb_offline_and_tensorboard_together_and_after_a_resume(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = {"trackers": "tensorboard,wandb", "tracker_project": "films", "checkpoint_every": 2, "steps": 3}
    first = words(world, "rl", run, **flags)

    class Stopped(Exception):
        pass

    def stop(step: int, *rest: Any) -> None:
        if step == 3:  # logged, and not in a checkpoint: it is computed and logged again
            raise Stopped

    with pytest.raises(Stopped):
        rl.train(parse(RLConfig, "rl", first).config, on_step=stop)
    before = json.loads((run / "trackers.json").read_text())
    assert main(["rl", *first]) == 0
    after = json.loads((run / "trackers.json").read_text())
    assert {name: one["id"] for name, one in after.items()} == {name: one["id"] for name, one in before.items()}
    assert_same(tracked.scalars(run / "tensorboard"), run)
    assert json.loads((run / "status.json").read_text())["resumed_from"] == 2
    folders = sorted(path.name for path in (tmp_path / "wandb-home" / "wandb").glob("offline-run-*"))
    assert folders and all(name.endswith(after["wandb"]["id"]) for name in folders)
    config, rows = tracked.wandb_history(tmp_path / "wandb-home" / "wandb")
    assert config["seed"] == 0 and config["sampling.batch_size"] == 6
    assert [row["_step"] for row in rows] == [1, 2, 3]
    found = {name: {row["_step"]: row[name] for row in rows if name in row} for name in logged(run)}
    times = {name for name in found if name.startswith(("time/", "memory/"))}  # step 3 was logged by the first part
    for name, values in logged(run).items():
        assert found[name].keys() == values.keys()
        steps = [1, 2] if name in times else values
        assert all(found[name][step] == values[step] for step in steps if step in values), name


def test_of_two_processes_the_main_one_logs(world: Path, tmp_path: Path, heavy: Server) -> None:
    run = tmp_path / "run"
    done = heavy.pair("rl", *words(world, "rl", run, trackers="tensorboard"), cwd=tmp_path)
    assert [one.code for one in done] == [0, 0], [one.err for one in done]
    assert_same(tracked.scalars(run / "tensorboard"), run)
    assert len(list((run / "tensorboard").glob("events.*"))) == 1


@pytest.mark.long
@pytest.mark.peers
def test_trackio_s_database_holds_every_number(world: Path, tmp_path: Path) -> None:
    package = tracked.install("trackio", tmp_path / "package")
    environment = {"PYTHONPATH": f"{package}:{Path(__file__).parents[2] / 'src'}", "TRACKIO_DIR": str(tmp_path / "t")}
    run = tmp_path / "run"
    done = run_python(
        "-m", "apportion", "rl", *words(world, "rl", run, trackers="trackio"), cwd=tmp_path, **environment
    )
    done.assert_done()
    assert done.out == f"{run}\n"
    key = json.loads((run / "trackers.json").read_text())["trackio"]["id"]
    rows = tracked.trackio_rows(tmp_path / "t", "apportion")
    assert {name for name, _, _ in rows} == {f"run-{key}"}
    found: dict[str, dict[int, float]] = {}
    for _, step, metrics in rows:
        for name, value in json.loads(metrics).items():
            found.setdefault(name, {})[step] = value
    assert_same({name: values for name, values in found.items() if name in logged(run)}, run)


def test_a_tracker_that_fails_is_counted_and_ends_nothing(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings = parse(SFTConfig, "sft", words(world, "sft", run, trackers="tensorboard")).config
    with training_session("sft", settings, {"seed": 0}) as session:
        assert session.run is not None
        (run / "tensorboard").write_text("")  # a file stands where the folder should be
        for step in session.steps(3):
            session.log(step, {"loss": 1.0 / step})
        session.run.write_status("finished")
    assert len(tiny_runs.read_lines(run / "metrics.jsonl")) == 3
    assert json.loads((run / "trackers.json").read_text())["tensorboard"]["failures"] == 4
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    err = capsys.readouterr().err
    assert err.count('warning: tracker tensorboard: got "FileExistsError') == 1 and "4 calls failed" in err


def test_without_trackers_no_tracker_is_imported_and_no_file_is_written(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    program = (
        "import sys\nfrom apportion.cli.main import main\ncode = main(sys.argv[1:])\n"
        "print(sorted({'wandb', 'tensorboard', 'trackio'} & set(sys.modules)))\nsys.exit(code)\n"
    )
    done = run_python("-c", program, "rl", *words(world, "rl", run, steps=1), cwd=tmp_path)
    done.assert_done()
    assert done.out.splitlines()[-1] == "[]"
    assert not {"trackers.json", "tensorboard", "wandb"} & {path.name for path in run.iterdir()}


def test_a_package_or_a_key_that_is_absent_is_an_error_before_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [path for path in sys.path if "site-packages" not in path])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(ConfigError, match="pip install trackio") as caught:
        check_trackers(["trackio"])
    assert caught.value.field == "trackers" and caught.value.got == "trackio"


@wandb_needed
def test_wandb_online_without_a_key_is_an_error_before_anything(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom apportion.training.publish.trackers import check_trackers\n"
        "try:\n    check_trackers(['wandb'])\nexcept ValueError as error:\n    print(error)\n"
    )
    away = {"WANDB_MODE": "online", "NETRC": str(tmp_path / "none"), "HOME": str(tmp_path)}
    for key, expected in (("", "'wandb without a key'"), ("short", "WANDB_API_KEY invalid"), ("a" * 40, "")):
        done = run_python("-c", program, cwd=tmp_path, **away, **({"WANDB_API_KEY": key} if key else {}))
        done.assert_done()
        assert (expected in done.out and "WANDB_MODE=offline" in done.out) if expected else done.out == "", done.out


def test_settings_become_values_that_every_tracker_takes() -> None:
    found = hyperparameters({"a": {"b": None, "c": [1, "x"]}, "on": True, "lr": 0.5, "name": "n"})
    assert found == {"a.b": "null", "a.c": '[1, "x"]', "on": True, "lr": 0.5, "name": "n"}


def test_the_flag_takes_several_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rl", "--reward_model", "x", "--trackers", "tensorboard", "wandb", "--steps", "3", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "trackers:\n- tensorboard\n- wandb\n" in out and "steps: 3\n" in out
    assert main(["rl", "--reward_model", "x", "--trackers", "tensorbord"]) == 2
    assert "trackers: got 'tensorbord'; expected names of trackers" in capsys.readouterr().err
