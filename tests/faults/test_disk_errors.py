"""Disks that are full, read-only or forbidden, with real ones: small file systems in a namespace of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
RUN = f'"{sys.executable}" -m apportion rl "$@"'


def in_namespace(script: str, flags: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell `script` in `folder` where it may mount file systems; its arguments are `flags`."""
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *flags]
    return subprocess.run(
        command, cwd=folder, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Return a folder to mount on; skips where this machine does not allow mounting."""
    if shutil.which("unshare") is None or in_namespace("mkdir -p m && mount -t tmpfs t m", [], tmp_path).returncode:
        pytest.skip("this machine does not let a process mount a file system of its own")
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.mark.parametrize(
    ("options", "pieces"),
    [
        ("size=8k", ["output: got 'disk/run (No space left on device)'", "Free some space, then run the same command"]),
        ("size=1m", ["output: got 'disk/run with", "MB free'", "at least 200 MB", "choose another --output"]),
        ("size=1m,ro", ["output: got 'disk/run (Read-only file system)'", "Choose a folder that is not read-only"]),
    ],
)
def test_a_disk_without_room_is_named_at_once(
    tmp_path: Path, disk: Path, rl_flags: list[str], options: str, pieces: list[str]
) -> None:
    done = in_namespace(f"mount -t tmpfs -o {options} t disk && {RUN}", [*rl_flags, "--output", "disk/run"], tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("apportion: output: got ") and done.stderr.count("\n") == 1
    for piece in pieces:
        assert piece in done.stderr


FILLED = f"""
mount -t tmpfs -o size=260m t disk
{RUN} 2> first.err & run=$!
while kill -0 $run 2> /dev/null && [ ! -d disk/run/checkpoints/step-2 ]; do sleep 0.02; done
cat /dev/zero > disk/filler 2> /dev/null
wait $run; echo $? > first.code
cp disk/run/status.json first.json
rm disk/filler
{RUN} 2> second.err; echo $? > second.code
cp -r disk/run kept
"""


def test_a_disk_that_fills_up_and_is_emptied_again(tmp_path: Path, disk: Path, rl_flags: list[str]) -> None:
    flags = [*rl_flags, "--output", "disk/run", "--steps", "60", "--checkpoint_every", "2", "--disk_wait", "1"]
    in_namespace(FILLED, flags, tmp_path)
    first = (tmp_path / "first.err").read_text()
    assert (tmp_path / "first.code").read_text() == "2\n" and "Traceback" not in first, first
    assert (
        first.count("apportion: paused: the disk of disk/run is full (") == 1 and "It waits 1 s (--disk_wait)" in first
    )
    assert "apportion: output: got 'disk/run (" in first and "No space left on device" in first
    assert first.endswith("Free some space, then run the same command again: it resumes from the last checkpoint.\n")
    assert json.loads((tmp_path / "first.json").read_text())["status"] != "finished"
    second = (tmp_path / "second.err").read_text()
    assert (tmp_path / "second.code").read_text() == "0\n", second
    lines = (tmp_path / "kept" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 61))
    assert (tmp_path / "kept" / "final" / "model.safetensors").is_file()


PAUSED = f"""
mount -t tmpfs -o size=260m t disk
{RUN} 2> run.err & run=$!
while kill -0 $run 2> /dev/null && [ ! -d disk/run/checkpoints/step-2 ]; do sleep 0.02; done
cat /dev/zero > disk/filler 2> /dev/null
while kill -0 $run 2> /dev/null && ! grep -q paused run.err; do sleep 0.02; done
ls disk/run/checkpoints > left
rm disk/filler
wait $run; echo $? > run.code
cp -r disk/run kept
"""


def test_a_run_waits_for_space_and_continues_by_itself(tmp_path: Path, disk: Path, rl_flags: list[str]) -> None:
    """Whether a log or a checkpoint came first: no half a line stays and no checkpoint is lost."""
    flags = [*rl_flags, "--steps", "60", "--checkpoint_every", "2", "--log_rollouts", "4"]
    in_namespace(PAUSED, [*flags, "--output", "disk/run"], tmp_path)
    err = (tmp_path / "run.err").read_text()
    assert (tmp_path / "run.code").read_text() == "0\n" and "Traceback" not in err, err
    assert "apportion: paused: " in err and "there is space in disk/run again: the run continues.\n" in err
    left = (tmp_path / "left").read_text().split()
    assert left and all(name.startswith("step-") for name in left)
    rows = [json.loads(line) for line in (tmp_path / "kept" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 61))
    texts = [json.loads(line) for line in (tmp_path / "kept" / "rollouts.jsonl").read_text().split("\n") if line]
    assert [(t["step"], t["row"]) for t in texts] == [(step, row) for step in range(1, 61) for row in range(4)]


@pytest.mark.parametrize(
    "more",
    [
        [],
        # a checkpoint that cannot be written is in test_a_disk_that_fills_up_and_is_emptied_again too
        pytest.param(["--checkpoint_every", "1", "--lora.rank", "0"], marks=pytest.mark.long),
    ],
)
def test_weights_that_cannot_be_written(tmp_path: Path, rl_flags: list[str], more: list[str]) -> None:
    # the weights are larger than a file may be here, the logs are not: at the end, or at the first checkpoint
    command = ["sh", "-c", f"ulimit -f 80; {RUN}", "sh", *rl_flags, *more]
    # nor could coverage write its own file there
    environment = {k: v for k, v in (os.environ | ENVIRONMENT).items() if not k.startswith("COVERAGE_")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "apportion: output: got 'run (" in done.stderr and "File too large" in done.stderr
    assert not (tmp_path / "run" / "final").exists() and not list(tmp_path.glob("run/checkpoints/step-?"))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, rl_flags: list[str]) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    command = [sys.executable, "-m", "apportion", "rl", *rl_flags, "--output", "locked/run"]
    if os.geteuid() == 0:  # the superuser may write everywhere, unless it gives that power away
        without = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
        if shutil.which("setpriv") is None or subprocess.run([*without, "true"], capture_output=True).returncode:
            pytest.skip("the superuser may write everywhere, and setpriv is not there to change that")
        command = [*without, *command]
    # nor could coverage write its own file there
    environment = {k: v for k, v in (os.environ | ENVIRONMENT).items() if not k.startswith("COVERAGE_")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "output: got 'locked/run (Permission denied)'" in done.stderr
    assert "Choose a folder you may write to." in done.stderr
