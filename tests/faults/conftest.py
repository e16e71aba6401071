"""The real command on bad input: tiny models and data, the command, and the form of every refusal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from examples import LONG

HERE = Path(__file__).parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
SHAPE = re.compile(r"apportion: [^\n]+: got [^\n]+; expected [^\n]+\. [^\n]+\n")


@dataclass
class Result:
    """The result of a command: exit code, output, and the model libraries that it loaded."""

    code: int
    out: str
    err: str
    folder: Path
    loaded: tuple[str, ...] | None = None  # None: the process ended before it could report them

    @property
    def loads_nothing(self) -> bool:
        """Whether no model library was loaded; not known of a new process."""
        return self.loaded == () or (LONG and self.loaded is None)

    def assert_refused(self, *pieces: str, before: str = "") -> None:
        """Check exit code 2, one message with all `pieces` after the output `before`, and no finished run."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert "Traceback" not in self.err and self.out == ""
        assert SHAPE.fullmatch(self.err.removeprefix(before)), self.err
        for piece in pieces:
            assert piece in self.err, (piece, self.err)
        assert not [path for path in self.folder.rglob("final") if path.is_dir()]
        assert not [path for path in self.folder.rglob("status.json") if "finished" in path.read_text()]

    def assert_refused_early(self, *pieces: str) -> None:
        """Check `assert_refused`, and that no model library was loaded before the error."""
        self.assert_refused(*pieces)
        assert self.loads_nothing

    def assert_done(self) -> None:
        """Check that the command succeeded."""
        assert self.code == 0 and "Traceback" not in self.err, (self.code, self.err)


class Server:
    """A fork server, and the commands that it runs; under APPORTION_LONG=1 each command is a new process."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.folder, self.count = folder, 0
        command = [sys.executable, str(HERE / "fork_server.py"), kind]
        self.process = subprocess.Popen(
            command, env=os.environ | ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, *arguments: object, cwd: Path, **environment: str) -> Result:
        """Run `apportion ARGUMENTS` in folder `cwd` and return its result."""
        if LONG:
            return run_python("-m", "apportion", *arguments, cwd=cwd, **environment)
        self.count += 1
        files = {name: self.folder / f"{self.count}.{name}" for name in ("out", "err", "loaded")}
        request: dict[str, Any] = {"argv": [str(a) for a in arguments], "cwd": str(cwd), "env": environment}
        request |= {name: str(path) for name, path in files.items()}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        loaded = tuple(json.loads(files["loaded"].read_text())) if files["loaded"].exists() else None
        return Result(code, files["out"].read_text(), files["err"].read_text(), cwd, loaded)


def run_python(*arguments: object, cwd: Path, timeout: float = 120, **environment: str) -> Result:
    """Run a new Python process and return its result."""
    command, environment = [sys.executable, *map(str, arguments)], os.environ | ENVIRONMENT | environment
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    return Result(done.returncode, done.stdout, done.stderr, cwd)


@contextmanager
def server(kind: str, folder: Path) -> Iterator[Server]:
    """Start a fork server and end it."""
    started = Server(kind, folder)
    try:
        yield started
    finally:
        assert started.process.stdin is not None
        started.process.stdin.close()
        started.process.wait(timeout=60)


@pytest.fixture(scope="session")
def light(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that has imported no model library, so that a command's own imports show."""
    with server("light", tmp_path_factory.mktemp("light")) as started:
        yield started


@pytest.fixture(scope="session")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the model libraries imported, for commands that reach a model."""
    with server("heavy", tmp_path_factory.mktemp("heavy")) as started:
        yield started


@pytest.fixture
def command(light: Server, tmp_path: Path) -> Callable[..., Result]:
    """Return `apportion` for mistakes that are known before any model; it runs in the test's own folder."""
    return lambda *arguments, **environment: light.run(*arguments, cwd=tmp_path, **environment)


@pytest.fixture
def model_command(heavy: Server, tmp_path: Path) -> Callable[..., Result]:
    """Return `apportion` for commands that load models; it runs in the test's own folder."""
    return lambda *arguments, **environment: heavy.run(*arguments, cwd=tmp_path, **environment)


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., Result]:
    """Return the command as a new Python process in the test's folder: slow, and exactly what a user runs."""
    return lambda *arguments: run_python(*arguments, cwd=tmp_path)


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """Return tests/support/tiny.py, which makes small real models."""
    import tiny

    return tiny


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny: ModuleType) -> Path:
    """Return a folder with a tiny policy, a reward model, prompts.jsonl and reviews.csv, never written to by tests."""
    folder = tmp_path_factory.mktemp("world")
    tiny.save_policy(folder / "policy")
    tiny.save_reward(folder / "reward")
    tiny.save_prompts(folder / "prompts.jsonl")
    tiny.save_reviews(folder / "reviews.csv")
    return folder


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of models, each wrong in the way that its name says; made once and only read."""
    from broken_models import save_broken

    return save_broken(tmp_path_factory.mktemp("broken"))


@pytest.fixture(scope="session")
def rl_flags(world: Path) -> list[str]:
    """Return the flags of a run of two small steps that works."""
    flags = {
        "policy": world / "policy",
        "reward_model": world / "reward",
        "prompts": world / "prompts.jsonl",
        "output": "run",
        "steps": 2,
        "checkpoint_every": 0,
        "sampling.batch_size": 4,
        "sampling.max_new_tokens": 4,
        "ppo.mini_batch": 4,
        "ppo.epochs": 1,
        "lora.rank": 4,
        "dtype": "float32",
    }
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
