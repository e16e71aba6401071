"""The real command on bad input: tiny models and data, the command, and the form of every refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from commands import Result, Server, run_python


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
