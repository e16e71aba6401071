"""Writes docs/licences.md: the licence of every locked package, from what is installed. `--check` compares instead."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "licences.md"
LOCKS = {"To run": "requirements.lock", "To develop": "requirements-dev.lock"}
HEAD = """# Licences of dependencies

Made by `make licences` from the metadata of the installed packages; apportion itself is Apache-2.0 and ships none of
them but plotly's script (MIT), which `apportion report` embeds in its page. `make check` says when a locked package is
not listed here in its version.
"""
SHORT = {  # what a classifier says -> the name that SPDX gives it
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "MIT License": "MIT",
    "Python Software Foundation License": "PSF-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "ISC License (ISCL)": "ISC",
    "The Unlicense (Unlicense)": "Unlicense",
}
BY_HAND: dict[str, str] = {}  # where the metadata says nothing: from the package's LICENSE file


def locked(name: str) -> dict[str, str]:
    """Return {package: version} of a lock file."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.strip().split("==") for line in lines if line.strip() and not line.startswith("#"))


def licence(package: str) -> str:
    """Return what the installed package says of its licence. Raises PackageNotFoundError when it is not installed."""
    message = metadata(package)
    if expression := message.get("License-Expression"):
        return str(expression)
    lines = message.get_all("Classifier") or ()
    classifiers = [line.split(" :: ")[-1] for line in lines if line.startswith("License ::")]
    known = sorted({SHORT.get(name, name) for name in classifiers if name != "OSI Approved"})
    if known:
        return " or ".join(known)
    first = (message.get("License") or "").strip().splitlines()
    return SHORT.get(first[0], first[0])[:60] if first else BY_HAND.get(package, "unknown")


def page() -> tuple[str, list[str]]:
    """Return the page, and what is wrong with it: packages without a known licence."""
    parts, wrong = [HEAD], []
    for title, lock in LOCKS.items():
        rows = []
        for package, version in sorted(locked(lock).items()):
            try:
                found = licence(package)
            except PackageNotFoundError:
                found = "not installed"
            if found in ("unknown", "not installed"):
                wrong.append(f"{package} {version}: {found}")
            rows.append(f"| {package} | {version} | {found} |")
        parts.append(f"\n## {title}\n\n| package | version | licence |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "".join(parts), wrong


def missing(text: str) -> list[str]:
    """Return the locked packages that `text` does not list in their version."""
    listed = set(re.findall(r"^\| (\S+) \| (\S+) \| \S", text, flags=re.MULTILINE))
    return [f"{p}=={v} ({lock})" for lock in LOCKS.values() for p, v in locked(lock).items() if (p, v) not in listed]


def main() -> int:
    """Write the page, or with `--check` say what it lacks; return the exit code."""
    if "--check" in sys.argv[1:]:
        lacking = missing(PAGE.read_text(encoding="utf-8"))
        print(
            "\n".join(f"docs/licences.md lacks {one}: run `make licences`" for one in lacking) or "licences: all listed"
        )
        return int(bool(lacking))
    text, wrong = page()
    PAGE.write_text(text, encoding="utf-8")
    print("\n".join(wrong) or f"{PAGE}: written")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
