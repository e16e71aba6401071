"""Disks that are full, read-only or forbidden, with real ones: small file systems in a namespace of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import ENVIRONMENT, Result, Server, server

NAMESPACE = ("unshare", "--map-root-user", "--mount")


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose commands see file systems that nobody else sees; skips where this machine lets none be mounted."""
    trial = [*NAMESPACE, "mount", "-t", "tmpfs", "t", str(tmp_path_factory.mktemp("trial"))]
    if shutil.which("unshare") is None or subprocess.run(trial, capture_output=True).returncode:
        pytest.skip("this machine does not let a process mount a file system of its own")
    with server("heavy", tmp_path_factory.mktemp("inside"), NAMESPACE) as started:
        yield started


class Disk:
    """A small file system on the folder `disk` of a test, and what is on it, as the commands of `inside` see it."""

    def __init__(self, inside: Server, folder: Path) -> None:
        self.inside, self.folder = inside, folder
        (folder / "disk").mkdir()
        self.seen = Path(f"/proc/{inside.process.pid}/root{folder / 'disk'}")

    def mount(self, options: str) -> None:
        words = ["mount", "-t", "tmpfs", "-o", options, "t", str(self.folder / "disk")]
        namespace = ["nsenter", "--target", str(self.inside.process.pid), "--user", "--mount", "--preserve-credentials"]
        subprocess.run([*namespace, *words], check=True)

    def run(self, flags: list[str]) -> Result:
        return self.inside.fork("rl", *flags, cwd=self.folder)

    def fill(self) -> None:
        """Write zeros until nothing more fits."""
        with (self.seen / "filler").open("wb", buffering=0) as file:
            block = bytes(2**16)
            while block:
                try:
                    file.write(block)
                except OSError:
                    block = block[: len(block) // 2]

    def lines(self, name: str) -> list[dict[str, object]]:
        """Return the objects of a JSON-lines file of the run."""
        return [json.loads(line) for line in (self.seen / "run" / name).read_text().split("\n") if line]


@pytest.fixture
def disk(inside: Server, tmp_path: Path) -> Disk:
    return Disk(inside, tmp_path)


@pytest.mark.parametrize(
    ("options", "pieces"),
    [
        ("size=8k", ["output: got 'disk/run (No space left on device)'", "Free some space, then run the same command"]),
        ("size=1m", ["output: got 'disk/run with", "MB free'", "at least 200 MB", "choose another --output"]),
        ("size=1m,ro", ["output: got 'disk/run (Read-only file system)'", "Choose a folder that is not read-only"]),
    ],
)
def test_a_disk_without_room_is_named_at_once(disk: Disk, rl_flags: list[str], options: str, pieces: list[str]) -> None:
    disk.mount(options)
    done = disk.run([*rl_flags, "--output", "disk/run"])
    assert done.code == 2 and "Traceback" not in done.err, done.err
    assert done.err.startswith("apportion: output: got ") and done.err.count("\n") == 1
    for piece in pieces:
        assert piece in done.err


@pytest.fixture
def run_until_full(disk: Disk) -> Iterator[Callable[[list[str]], Future[Result]]]:
    """Return what starts a run on a disk that is filled up after its second batch."""
    with ThreadPoolExecutor(1) as pool:

        def start(flags: list[str]) -> Future[Result]:
            disk.mount("size=260m")
            running = pool.submit(disk.run, flags)
            wait_for(lambda: (disk.seen / "run" / "checkpoints" / "step-2").is_dir(), running)
            disk.fill()
            return running

        yield start


def wait_for(condition: Callable[[], bool], running: Future[Result]) -> None:
    """Wait until it holds, at most as long as the run takes."""
    while not condition() and not running.done():
        time.sleep(0.005)


def test_a_disk_that_fills_up_and_is_emptied_again(
    disk: Disk, run_until_full: Callable[[list[str]], Future[Result]], rl_flags: list[str]
) -> None:
    flags = [*rl_flags, "--output", "disk/run", "--steps", "60", "--checkpoint_every", "2", "--disk_wait", "1"]
    first = run_until_full(flags).result()
    assert first.code == 2 and "Traceback" not in first.err, first.err
    assert first.err.count("apportion: paused: the disk of disk/run is full (") == 1
    assert "It waits 1 s (--disk_wait)" in first.err
    assert "apportion: output: got 'disk/run (" in first.err and "No space left on device" in first.err
    fix = "Free some space, then run the same command again: it resumes from the last checkpoint.\n"
    assert first.err.endswith(fix)
    assert json.loads((disk.seen / "run" / "status.json").read_text())["status"] != "finished"
    (disk.seen / "filler").unlink()
    second = disk.run(flags)
    assert second.code == 0, second.err
    assert [line["step"] for line in disk.lines("metrics.jsonl")] == list(range(1, 61))
    assert (disk.seen / "run" / "final" / "model.safetensors").is_file()


def test_a_run_waits_for_space_and_continues_by_itself(
    disk: Disk, run_until_full: Callable[[list[str]], Future[Result]], rl_flags: list[str]
) -> None:
    """Whether a log or a checkpoint came first: no half a line stays and no checkpoint is lost."""
    running = run_until_full(
        [*rl_flags, "--steps", "60", "--checkpoint_every", "2", "--log_rollouts", "4", "--output", "disk/run"]
    )
    wait_for(lambda: "paused" in disk.inside.errors, running)
    left = [path.name for path in (disk.seen / "run" / "checkpoints").iterdir()]
    (disk.seen / "filler").unlink()
    done = running.result()
    assert done.code == 0 and "Traceback" not in done.err, done.err
    assert "apportion: paused: " in done.err
    assert "there is space in disk/run again: the run continues.\n" in done.err
    assert left and all(name.startswith("step-") for name in left)
    assert [row["step"] for row in disk.lines("metrics.jsonl")] == list(range(1, 61))
    places = [(t["step"], t["row"]) for t in disk.lines("rollouts.jsonl")]
    assert places == [(step, row) for step in range(1, 61) for row in range(4)]


@pytest.mark.parametrize(
    "more",
    [
        [],
        # a checkpoint that cannot be written is in test_a_disk_that_fills_up_and_is_emptied_again too
        pytest.param(["--checkpoint_every", "1", "--lora.rank", "0"], marks=pytest.mark.long),
    ],
)
def test_weights_that_cannot_be_written(heavy: Server, tmp_path: Path, rl_flags: list[str], more: list[str]) -> None:
    # the weights are larger than a file may be here, the logs are not: at the end, or at the first checkpoint
    done = heavy.fork("rl", *rl_flags, *more, cwd=tmp_path, largest_file=80 * 512)
    assert done.code == 2 and "Traceback" not in done.err, done.err
    assert "apportion: output: got 'run (" in done.err and "File too large" in done.err
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
