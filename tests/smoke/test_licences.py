"""The page of licences lists every locked package in its version, and its check can say that one is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("licences", ROOT / "tools" / "licences.py")
assert SPEC is not None and SPEC.loader is not None
licences = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(licences)


def test_every_locked_package_is_listed() -> None:
    text = licences.PAGE.read_text(encoding="utf-8")
    assert licences.missing(text) == []
    assert "unknown" not in text and "not installed" not in text


def test_a_package_that_is_not_listed_is_named() -> None:
    text = licences.PAGE.read_text(encoding="utf-8")
    version = licences.locked("requirements.lock")["torch"]
    without = text.replace(f"| torch | {version} |", "| torch | 0.0 |")
    assert licences.missing(without) == [f"torch=={version} (requirements.lock)"]


@pytest.mark.parametrize(("package", "message"), [("torch", "BSD"), ("transformers", "Apache"), ("pytest", "MIT")])
def test_licences_come_from_the_packages(package: str, message: str) -> None:
    assert message in licences.licence(package)
