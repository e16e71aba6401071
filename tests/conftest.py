"""Settings of every test: one thread, quiet libraries, no network, and the number of hypothesis examples."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# before torch and transformers are imported: no test may use the network
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for commands that run in this process

# importlib mode does not change sys.path; appended last, so that no module there shadows another
sys.path.append(str(Path(__file__).parent / "support"))

import pytest
import torch
from commands import Server, server
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

SLOW_CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large]
# "default" draws the same examples every time, so that a red run can be repeated; "long" draws new ones
settings.register_profile(
    "default", max_examples=50, deadline=None, derandomize=True, suppress_health_check=SLOW_CHECKS
)
settings.register_profile("long", max_examples=200, deadline=None, print_blob=True, suppress_health_check=SLOW_CHECKS)
settings.load_profile("long" if os.environ.get("APPORTION_LONG") == "1" else "default")


@pytest.fixture(scope="session", autouse=True)
def quiet_transformers() -> None:
    """Keep transformers' warnings about freshly initialised heads out of the test output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, whichever tests ran before it."""
    torch.manual_seed(0)


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
