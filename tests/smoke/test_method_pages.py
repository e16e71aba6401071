"""docs/methods: a page a method, drawn from its docstring, and every one of them up to date."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from apportion import advantages, credit, losses, segments

ROOT = Path(__file__).parents[2]
ROOMS = {"credit": credit, "segments": segments, "advantages": advantages, "loss": losses}
EVERY = [(field, name) for field, room in ROOMS.items() for name in room.METHODS]
EVERY += [("preference", name) for name in losses.PREFERENCES]


def test_the_pages_and_pictures_are_what_would_be_written() -> None:
    command = [sys.executable, "tools/method_pages.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"run `python tools/method_pages.py`: {done.stdout}{done.stderr}"


@pytest.mark.parametrize(("field", "name"), EVERY)
def test_a_page_states_source_assumption_and_use(field: str, name: str) -> None:
    text = (ROOT / "docs" / "methods" / f"{field}-{name}.md").read_text(encoding="utf-8")
    assert "**Assumes:**" in text and "**Use it " in text
    if field != "segments":
        assert "Source" in text
    shown = f"images/{field}-{name}.svg"
    if field in ("credit", "segments") and name not in ("implicit", "process"):  # these need a model or a function
        assert shown in text and (ROOT / "docs" / "methods" / shown).is_file()


def test_the_index_links_every_page() -> None:
    text = (ROOT / "docs" / "methods" / "README.md").read_text(encoding="utf-8")
    assert all(f"({field}-{name}.md)" in text for field, name in EVERY)
