"""The cores that are really free: control groups, affinity, hyper-threads, load, and what torch is given of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

from apportion.errors import ConfigError
from apportion.system import cpu

CLEAN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", *cpu.ASKED)


def write(root: Path, **files: str) -> Path:
    """Write files under `root`; "__" in a name stands for "/"."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def version_2(root: Path, group: str, inside: str = "/", **limits: str) -> Path:
    """Write a version-2 hierarchy mounted at /sys/fs/cgroup, with limits by folder ("" is the mount)."""
    mount = f"31 23 0:28 {inside} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
    write(root, proc__self__cgroup=f"0::{group}", proc__self__mountinfo=f"22 1 8:1 / / rw - ext4 /dev/sda rw\n{mount}")
    for folder, text in limits.items():
        write(root, **{f"sys__fs__cgroup__{folder}__cpu.max".replace("____", "__"): text})
    return root


def version_1(root: Path, group: str, inside: str = "/", **quotas: str) -> Path:
    """Write a version-1 hierarchy (cpu with cpuacct, and memory) with quotas in microseconds of 100,000 by folder."""
    mounts = [
        f"3{i} 23 0:2{i} {inside} /sys/fs/cgroup/{n} rw - cgroup cgroup rw,{n}"
        for i, n in enumerate(("memory", "cpu,cpuacct"))
    ]
    write(
        root,
        proc__self__cgroup=f"8:memory:/elsewhere\n4:cpu,cpuacct:{group}\n0::/",
        proc__self__mountinfo="\n".join(mounts),
    )
    for folder, quota in quotas.items():
        place = f"sys/fs/cgroup/cpu,cpuacct/{folder}".replace("__", "/").rstrip("/")
        write(root / place, **{"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000"})
    return root


@pytest.mark.parametrize(
    ("group", "limits", "expected"),
    [
        ("/", {"": "max 100000"}, None),
        ("/", {"": "250000 100000"}, 2.5),
        ("/a/b", {"a__b": "max 100000"}, None),
        ("/a/b", {"a__b": "400000 100000", "a": "150000 100000"}, 1.5),  # the parent's is tighter
        ("/a/b", {"a__b": "50000 100000", "a": "max 100000", "": "900000 100000"}, 0.5),
        ("/a", {"a__c": "10000 100000", "a": "300000 50000"}, 6.0),  # a child's limit is not ours
        ("/../outside", {"": "200000 100000"}, 2.0),  # a namespace that does not show our own group
        ("/gone/away", {"": "200000 100000"}, 2.0),  # a container: the mount is our group
    ],
)
def test_the_tightest_limit_of_version_2_counts(
    tmp_path: Path, group: str, limits: dict[str, str], expected: float | None
) -> None:
    assert cpu.cgroup_quota(version_2(tmp_path, group, **limits)) == expected


@pytest.mark.parametrize(
    ("group", "inside", "quotas", "expected"),
    [
        ("/", "/", {"": "-1"}, None),
        ("/", "/", {"": "150000"}, 1.5),
        ("/jobs/one", "/", {"jobs__one": "-1", "jobs": "300000"}, 3.0),
        ("/docker/f00", "/docker/f00", {"": "200000"}, 2.0),  # the container's own group is mounted
        ("/docker/f00/x", "/docker/f00", {"x": "100000", "": "200000"}, 1.0),
        ("/dockers/x", "/docker", {"x": "100000", "": "200000"}, 2.0),  # a name that begins alike is no parent
    ],
)
def test_the_tightest_limit_of_version_1_counts(
    tmp_path: Path, group: str, inside: str, quotas: dict[str, str], expected: float | None
) -> None:
    assert cpu.cgroup_quota(version_1(tmp_path, group, inside, **quotas)) == expected


def test_where_nothing_is_told_there_is_no_limit(tmp_path: Path) -> None:
    assert cpu.cgroup_quota(tmp_path) is None and cpu.load(tmp_path) is None
    assert cpu.physical_cores({0, 1, 5}, tmp_path) == 3


def hyper_threads(root: Path) -> Path:
    """Write the topology of two cores with two threads each: 0 with 2, and 1 with 3."""
    for number, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        write(root / f"sys/devices/system/cpu/cpu{number}/topology", core_cpus_list=siblings)
    return root


@pytest.mark.parametrize(("allowed", "expected"), [({0, 1, 2, 3}, 2), ({0, 2}, 1), ({0, 1}, 2), ({3}, 1)])
def test_threads_of_one_core_count_once(tmp_path: Path, allowed: set[int], expected: int) -> None:
    assert cpu.physical_cores(allowed, hyper_threads(tmp_path)) == expected


@pytest.mark.parametrize(
    ("allowed", "quota", "environment", "threads", "why"),
    [
        ({0, 1, 2, 3}, "max", {}, 2, "2 cores (4 hyper-threads)"),
        ({0, 2}, "max", {}, 1, "1 cores in its affinity (2 of 4 processors)"),
        ({0, 1, 2, 3}, "190000", {}, 1, "2 cores (4 hyper-threads), a quota of 1.9 of them"),
        ({0, 1, 2, 3}, "20000", {}, 1, "2 cores (4 hyper-threads), a quota of 0.2 of them"),
        ({0, 1, 2, 3}, "800000", {}, 2, "2 cores (4 hyper-threads)"),
        ({0, 1, 2, 3}, "max", {"LOCAL_WORLD_SIZE": "2"}, 1, "2 cores (4 hyper-threads), shared by 2 processes"),
        (
            {0, 1, 2, 3},
            "max",
            {"LOCAL_RANK": "1", "WORLD_SIZE": "9"},
            1,
            "2 cores (4 hyper-threads), shared by 9 processes",
        ),
        ({0, 1, 2, 3}, "max", {"WORLD_SIZE": "9"}, 2, "2 cores (4 hyper-threads)"),  # nine machines, for all we know
        ({1, 3}, "max", {"LOCAL_WORLD_SIZE": "2"}, 1, "1 cores in its affinity (2 of 4 processors)"),
        ({0, 1}, "max", {"LOCAL_WORLD_SIZE": "2"}, 2, "2 cores in its affinity (2 of 4 processors)"),
    ],
)
def test_what_is_left_for_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[int], quota: str, environment: dict[str, str],
    threads: int, why: str,
) -> None:  # fmt: skip
    root = hyper_threads(version_2(tmp_path, "/", **{"": f"{quota} 100000"}))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    found = cpu.available(root, environment)
    assert (found.threads, found.why) == (threads, why)


def python(code: str, **environment: str) -> Any:
    """Run `code` in a Python of its own, without thread settings but those given, and return its JSON."""
    base = {name: value for name, value in os.environ.items() if name not in CLEAN}
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
        "from apportion import cores; import torch; s = cpu.settle()\n"
        "print(json.dumps([s.threads, s.source, s.cores.allowed, torch.get_num_threads()]))"
    )
    assert python(code) == [1, "detected", 1, 1]


SETTLE = (
    "import json, os, sys; from apportion import cores; import torch; before = torch.get_num_threads()\n"
    "s = cpu.settle({})\n"
    "now = torch.get_num_threads(), os.environ.get('OMP_NUM_THREADS')\n"
    "print(json.dumps([s.threads, s.source, s.waiting, before, *now]))"
)


def test_what_the_user_set_stays() -> None:
    assert python(SETTLE.format(""), OMP_NUM_THREADS="1") == [1, "OMP_NUM_THREADS", "default", 1, 1, "1"]
    said = python(SETTLE.format("2"), OMP_NUM_THREADS="1", OMP_WAIT_POLICY="ACTIVE")
    assert said == [2, "--threads", "user", 1, 2, "1"]


ORDER = """
import json, os, sys
NAMES = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
class Monitor:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            seen.append({n: os.environ[n] for n in NAMES if n in os.environ})
seen = []
sys.meta_path.insert(0, Monitor())
sys.argv = sys.orig_argv = WORDS
from apportion import cli
print(json.dumps(seen[0]))
"""


@pytest.fixture
def competitors() -> Iterator[None]:
    """Keep every processor busy with real processes."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    yield
    for loop in loops:
        loop.kill()
        loop.wait()


@pytest.mark.usefixtures("competitors")
def test_on_a_busy_machine_the_command_has_threads_sleep_before_torch_loads() -> None:
    def seen(words: list[str], **environment: str) -> Any:
        return python(ORDER.replace("WORDS", repr(words)), **environment)

    assert seen(["python", "/usr/bin/apportion", "rl"]) == cpu.WAITING
    assert seen(["python", "-m", "apportion", "rl"]) == cpu.WAITING
    assert seen(["python", "train.py"]) == {}, "a library leaves the environment alone"
    assert seen(["apportion"], OMP_WAIT_POLICY="ACTIVE") == {"OMP_WAIT_POLICY": "ACTIVE"}
    assert seen(["apportion"], GOMP_SPINCOUNT="7") == {"GOMP_SPINCOUNT": "7"}


@pytest.mark.usefixtures("competitors")
def test_openmp_itself_heard_it() -> None:
    """OpenMP tells what it read when it is asked to: the real command, from its start."""
    base = {name: value for name, value in os.environ.items() if name not in CLEAN} | {"OMP_DISPLAY_ENV": "TRUE"}
    command = [sys.executable, "-m", "apportion", "doctor"]
    done = subprocess.run(command, env=base, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr and "threads sleep while they wait" in done.stdout


@pytest.mark.parametrize(
    ("running", "found"), [(1, "default"), (2, "passive"), (9, "passive")]
)  # 1 is this process: two threads on two processors leave no room for another
def test_threads_sleep_only_where_others_want_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: int, found: str
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.delitem(sys.modules, "torch")
    environment: dict[str, str] = {}
    assert cpu.before_torch(busy(tmp_path, running), environment) == found
    assert environment == (cpu.WAITING if found == "passive" else {})
    assert cpu.before_torch(tmp_path, environment) == found, "asked again, it says the same"


def busy(root: Path, running: int) -> Path:
    return write(root, proc__loadavg=f"0.50 1.00 1.00 {running}/300 4242")


@pytest.mark.parametrize(("running", "warned"), [(1, False), (2, True), (4, True)])
def test_a_loaded_machine_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: int, warned: bool
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    for name in CLEAN:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    try:
        said = cpu.settle(root=busy(tmp_path, running)).warnings
        many = cpu.settle(8, root=busy(tmp_path, 1)).warnings
    finally:
        torch.set_num_threads(before)
    assert [f"{running - 1} other tasks run on 2 processors" in line for line in said] == [True] * warned
    assert len(many) == 1 and "8 threads (--threads) on 2 cores" in many[0] and many[0].endswith("use --threads 2")


def test_a_launchers_one_thread_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found = cpu.settle(root=busy(tmp_path, 1))
    assert (found.threads, found.cores.threads) == (1, 4)
    assert found.warnings == ("OMP_NUM_THREADS=1, which torchrun sets unasked; use --threads 4, which are free",)


@pytest.mark.parametrize("threads", [0, -1, True, 2.0])
def test_a_number_that_is_none_is_refused(threads: Any) -> None:
    with pytest.raises(ConfigError, match="threads: got .*a whole number >= 1"):
        cpu.settle(threads)


def test_the_setting_reaches_torch_and_the_run_folder(tmp_path: Path) -> None:
    """The real command from its start; then the run goes on with other threads, which is said."""
    world = tiny_runs.world(tmp_path)
    run, base = tmp_path / "run", {name: value for name, value in os.environ.items() if name not in CLEAN}

    def command(*more: str) -> subprocess.CompletedProcess[str]:
        words = [*tiny_runs.flags(world, run, steps=3, checkpoint_every=1), *more]
        return subprocess.run(
            [sys.executable, "-m", "apportion", "rl", *words], env=base, capture_output=True, text=True, timeout=240
        )

    done = command("--threads", "2")
    assert done.returncode == 0, done.stderr
    status = json.loads((run / "status.json").read_text())
    assert status["threads"] == 2 and status["status"] == "finished"
    (run / "status.json").write_text(json.dumps(status | {"status": "running"}))  # as if interrupted after step 2
    done = command("--threads", "1")
    assert done.returncode == 0 and "began with 2 threads and goes on with 1" in done.stderr, done.stderr
    assert json.loads((run / "status.json").read_text())["threads"] == 1
    refused = command("--threads", "0")
    assert refused.returncode == 2 and "threads: got 0" in refused.stderr


KEEP = """
import json, resource, sys
from apportion import cores
import torch
kept = cpu.keep_memory()
def work():
    for _ in range(8):
        torch.ones(6_000_000).add_(1)  # 24 MB
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


def test_kept_memory_is_not_faulted_in_anew() -> None:
    """Counted by the kernel in processes of their own: pages of eight tensors, or none."""
    kept, faults = python(KEEP)
    if not kept:
        pytest.skip("not glibc")
    decided, usual = python(KEEP, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="131072")
    assert not decided, "what the user set stays"
    assert faults < 500 and usual > 2 * faults + 4 * 24_000_000 // 65536
