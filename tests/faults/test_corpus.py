"""Every malformed input of the corpus through the real command: one message with its fix, and no files remain."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from examples import LONG
from malformed_inputs import CASES, Case

Command = Callable[..., Any]
KINDS = ("data", "yaml", "flags", "models", "tokenizers", "plugins")
LIGHT = [case for case in CASES if case.early]
HEAVY = [case for case in CASES if not case.early]
# a process from its start takes seconds: one kind in `make test`, all of them in `make test-long`
SAMPLE = [next(c for c in LIGHT if c.kind == kind) for kind in ("data", "plugins", "yaml", "flags")][: 4 if LONG else 1]
PROBE = """
import json, sys
from apportion.cli.main import main
try:
    code = main(sys.argv[1:])
finally:
    sys.stderr.write("\\nLOADED " + json.dumps(sorted(sys.modules)))
sys.exit(code)
"""
STACK = ("transformers", "peft", "accelerate", "datasets", "tokenizers")


def named(case: Case) -> str:
    return f"{case.kind}: {case.name}"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of malformed models, made once and only read."""
    from malformed_models import save_malformed

    return save_malformed(tmp_path_factory.mktemp("malformed"))


@pytest.fixture
def lay(
    tmp_path: Path, world: Path, rl_flags: list[str], request: pytest.FixtureRequest
) -> Callable[[Case], list[str]]:
    """Return a function that writes a case's files and returns its arguments."""

    def laid(case: Case) -> list[str]:
        for name, content in case.files.items():
            path = tmp_path / name
            if name.endswith("/"):
                path.mkdir()
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
        models = request.getfixturevalue("models") if "{models}" in str(case.arguments) else ""
        given = [word.replace("{world}", str(world)).replace("{models}", str(models)) for word in case.arguments]
        return [given[0], *(rl_flags if given[0] == "rl" and given[1:] else []), *given[1:]]

    return laid


def test_the_corpus_has_enough_distinct_cases_of_each_kind() -> None:
    assert len({(case.kind, case.name) for case in CASES}) == len(CASES) >= 60
    assert len({(case.arguments, repr(case.files)) for case in CASES}) == len(CASES), "no case stands twice"
    counted = Counter(case.kind for case in CASES)
    assert set(counted) == set(KINDS) and min(counted.values()) >= 10, counted


@pytest.mark.parametrize("case", LIGHT, ids=named)
def test_found_before_any_model_library(command: Command, lay: Callable[[Case], list[str]], case: Case) -> None:
    done = command(*lay(case))
    warned = done.err.startswith("warning: ")  # of rows that were left out, in words of its own
    done.assert_refused(*case.pieces, before=done.err.splitlines(keepends=True)[0] if warned else "")
    assert done.loads_nothing


@pytest.mark.parametrize("case", HEAVY, ids=named)
def test_found_when_the_model_is_read(
    model_command: Command, lay: Callable[[Case], list[str]], tmp_path: Path, case: Case
) -> None:
    done = model_command(*lay(case))
    done.assert_refused(*case.pieces)
    assert not list(tmp_path.rglob("planted-code-ran")) and not Path("planted-code-ran").exists()


@pytest.mark.parametrize("case", SAMPLE, ids=named)
def test_in_a_new_process(python: Command, lay: Callable[[Case], list[str]], case: Case) -> None:
    done = python("-c", PROBE, *lay(case))
    done.err, _, loaded = done.err.partition("\nLOADED ")
    done.assert_refused(*case.pieces)
    found = json.loads(loaded)
    assert not [name for name in STACK if name in found]


@pytest.mark.long
@pytest.mark.parametrize("case", [HEAVY[0]], ids=named)
def test_a_model_in_a_new_process(python: Command, lay: Callable[[Case], list[str]], case: Case) -> None:
    python("-m", "apportion", *lay(case)).assert_refused(*case.pieces)


@pytest.mark.skipif(sys.platform != "linux" or (os.geteuid() == 0 and not hasattr(os, "mkfifo")), reason="no pipes")
def test_a_pipe_is_not_waited_for(command: Command, tmp_path: Path, rl_flags: list[str]) -> None:
    os.mkfifo(tmp_path / "p.jsonl")
    command("rl", *rl_flags, "--prompts", "p.jsonl").assert_refused_early("p.jsonl, which is not a regular file")
