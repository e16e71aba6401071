"""Usable cores, torch's threads, OpenMP's waiting and malloc's settings, in processes of their own where it matters."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from commands import Result, Server

from apportion.errors import ConfigError
from apportion.system import cpu

SETTINGS = (*cpu.COUNTS, *cpu.WAITING)


def loadavg(folder: Path, others: int) -> Path:
    """Return a file like /proc/loadavg that counts `others` running tasks beside the process that reads it."""
    path = folder / "loadavg"
    path.write_text(f"0.50 1.00 1.00 {others + 1}/300 4242\n")
    return path


@pytest.fixture
def six_of_eight(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Six usable cores of eight processors, by the variable with which joblib is limited."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "6")
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("allowed", "environment", "count", "reason"),
    [
        (8, {}, 6, "6 cores of 8 processors"),
        (4, {}, 4, "4 cores of 8 processors"),
        (8, {"LOCAL_WORLD_SIZE": "2"}, 3, "6 cores of 8 processors, shared by 2 processes"),
        (8, {"LOCAL_RANK": "1", "WORLD_SIZE": "9"}, 1, "6 cores of 8 processors, shared by 9 processes"),
        (8, {"WORLD_SIZE": "9"}, 6, "6 cores of 8 processors"),  # it may be nine machines
        (4, {"LOCAL_WORLD_SIZE": "2"}, 4, "4 cores of 8 processors"),  # a worker with an affinity of its own
    ],
)
def test_cores_left_for_this_process(
    six_of_eight: pytest.MonkeyPatch, allowed: int, environment: dict[str, str], count: int, reason: str
) -> None:
    six_of_eight.setattr(os, "sched_getaffinity", lambda pid: set(range(allowed)), raising=False)
    cores = cpu.available_cores(environment)
    assert (cores.count, cores.reason) == (count, reason)


def python(code: str, **environment: str) -> Any:
    """Run `code` in a Python of its own, without thread settings but those given, and return its JSON."""
    base = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    base = {name: value for name, value in base.items() if not name.startswith(cpu.ALLOCATOR)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=base | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_a_process_confined_to_one_core_uses_one_thread() -> None:
    code = (
        "import json, os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from apportion.system import cpu; import torch; threads = cpu.configure_threads()\n"
        "print(json.dumps([threads.count, threads.source, cpu.allowed_processors(), torch.get_num_threads()]))"
    )
    assert python(code) == [1, "detected", 1, 1]


CONFIGURE = (
    "import json, os; from apportion.system import cpu; import torch; before = torch.get_num_threads()\n"
    "threads = cpu.configure_threads({})\n"
    "now = torch.get_num_threads(), os.environ.get('OMP_NUM_THREADS')\n"
    "print(json.dumps([threads.count, threads.source, threads.waiting, before, *now]))"
)


def test_settings_of_the_user_stay() -> None:
    assert python(CONFIGURE.format(""), OMP_NUM_THREADS="1") == [1, "OMP_NUM_THREADS", "default", 1, 1, "1"]
    result = python(CONFIGURE.format("2"), OMP_NUM_THREADS="1", OMP_WAIT_POLICY="ACTIVE")
    assert result == [2, "--threads", "user", 1, 2, "1"]


ORDER = """
import json, os, runpy, sys
NAMES = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(json.dumps({n: os.environ[n] for n in NAMES if n in os.environ}), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
"""
COMMAND = "sys.argv[1:] = ['doctor']; runpy.run_module('apportion', run_name='__main__')"
SCRIPT = "sys.argv[1:] = ['doctor']; from apportion.__main__ import main; main()"


@pytest.fixture
def competitors() -> Iterator[Callable[[], None]]:
    """Keep every processor busy with real processes of the lowest priority; yield what ends them."""
    code = "import os; os.nice(19)\nwhile True: pass"
    loops = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(os.cpu_count() or 1)]

    def end() -> None:
        for loop in loops:
            loop.kill()
            loop.wait()

    yield end
    end()


@pytest.mark.usefixtures("competitors")
def test_on_a_busy_machine_the_command_has_threads_sleep_before_torch_loads() -> None:
    assert python(ORDER + COMMAND) == cpu.PASSIVE
    assert python(ORDER + SCRIPT) == cpu.PASSIVE
    assert python(ORDER + "from apportion import Rollouts") == {}, "a library leaves the environment alone"
    assert python(ORDER + "import apportion; apportion.credit") == {}
    assert python(ORDER + COMMAND, OMP_WAIT_POLICY="ACTIVE") == {"OMP_WAIT_POLICY": "ACTIVE"}
    assert python(ORDER + COMMAND, GOMP_SPINCOUNT="7") == {"GOMP_SPINCOUNT": "7"}


def test_openmp_itself_reads_it(competitors: Callable[[], None]) -> None:
    """OpenMP prints what it read when OMP_DISPLAY_ENV is set: the real command, from its start."""
    base = {name: value for name, value in os.environ.items() if name not in SETTINGS} | {"OMP_DISPLAY_ENV": "TRUE"}
    command = [sys.executable, "-m", "apportion", "doctor"]
    with subprocess.Popen(command, env=base, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        # written when torch is loaded; read to its end, as `communicate` would lose what this stream has buffered
        lines = list(itertools.takewhile(lambda line: "ENVIRONMENT END" not in line, process.stderr))
        competitors()
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in "".join(lines) and "threads sleep while they wait" in out


@pytest.mark.parametrize(("others", "waiting"), [(0, "default"), (2, "default"), (3, "passive"), (9, "passive")])
def test_threads_sleep_only_where_others_want_the_cores(
    tmp_path: Path, six_of_eight: pytest.MonkeyPatch, others: int, waiting: str
) -> None:
    six_of_eight.delitem(sys.modules, "torch")
    environment: dict[str, str] = {}
    assert cpu.configure_waiting(environment, loadavg(tmp_path, others)) == waiting
    assert environment == (cpu.PASSIVE if waiting == "passive" else {})
    assert cpu.configure_waiting(environment, loadavg(tmp_path, 0)) == waiting, "a second call returns the same"


@pytest.mark.parametrize(("others", "warned"), [(0, False), (2, False), (3, True)])
def test_a_loaded_machine_is_warned_of(
    tmp_path: Path, six_of_eight: pytest.MonkeyPatch, others: int, warned: bool
) -> None:
    before = torch.get_num_threads()
    try:
        lines = cpu.configure_threads(loadavg=loadavg(tmp_path, others)).warnings
        many = cpu.configure_threads(9, loadavg=loadavg(tmp_path, 0)).warnings
    finally:
        torch.set_num_threads(before)
    assert ["3 other tasks run on 8 processors that 6 threads want" in line for line in lines] == [True] * warned
    assert len(many) == 1 and "9 threads (--threads) on 6 cores" in many[0] and many[0].endswith("use --threads 6")


def test_a_launchers_one_thread_is_warned_of(tmp_path: Path, six_of_eight: pytest.MonkeyPatch) -> None:
    six_of_eight.setenv("OMP_NUM_THREADS", "1")
    six_of_eight.setenv("LOCAL_WORLD_SIZE", "2")
    threads = cpu.configure_threads(loadavg=loadavg(tmp_path, 0))
    assert (threads.count, threads.cores.count) == (1, 3)
    assert threads.warnings == ("OMP_NUM_THREADS=1 is torchrun's default; use --threads 3, which are free",)


@pytest.mark.parametrize("threads", [0, -1, True, 2.0])
def test_an_impossible_number_is_refused(threads: Any) -> None:
    with pytest.raises(ConfigError, match="threads: got .*a whole number >= 1"):
        cpu.configure_threads(threads)


def test_the_setting_reaches_torch_and_the_run_folder(heavy: Server, tmp_path: Path) -> None:
    """Also where the run resumes with other threads, which is reported."""
    world = tiny_runs.world(tmp_path)
    run = tmp_path / "run"

    def command(*more: str) -> Result:
        return heavy.run("rl", *tiny_runs.flags(world, run, steps=3, checkpoint_every=1), *more, cwd=tmp_path)

    command("--threads", "2").assert_done()
    status = json.loads((run / "status.json").read_text())
    assert status["threads"] == 2 and status["status"] == "finished"
    (run / "status.json").write_text(json.dumps(status | {"status": "running"}))  # as if interrupted after step 2
    done = command("--threads", "1")
    assert done.code == 0 and "began with 2 threads and continues with 1" in done.err, done.err
    assert json.loads((run / "status.json").read_text())["threads"] == 1


KEEP = """
import json, resource
from apportion.system import cpu
import torch
kept = cpu.keep_freed_memory()
def work():
    for _ in range(8):
        torch.ones(6_000_000).add_(1)  # 24 MB
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


def test_kept_memory_is_not_faulted_in_again() -> None:
    """Counted by the kernel in processes of their own: pages of eight tensors, or none."""
    kept, faults = python(KEEP)
    if not kept:
        pytest.skip("not glibc")
    decided, usual = python(KEEP, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="131072")
    assert not decided, "what the user set stays"
    assert faults < 500 and usual > 2 * faults + 4 * 24_000_000 // 65536
