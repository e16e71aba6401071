"""Writes docs/methods/: one page a method, drawn from its docstring, with a picture of its credit on three responses.

    python tools/method_pages.py            # write the pages and pictures
    python tools/method_pages.py --check    # exit 1 and name the pages that are not what would be written

What a docstring cannot know stands in two files beside the pages: responses.json (three responses of the demo's policy
with what its reward model told of them; tools/record_responses.py writes it) and measured.json (what
`apportion diagnose` found; copied from a run).
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from response_pictures import credit_picture, segments_picture

from apportion import advantages, credit, losses, segments
from apportion.algorithms import ALGORITHMS
from apportion.registry import parse

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "methods"
ROOMS: Mapping[str, tuple[str, Mapping[str, Callable[..., Any]]]] = {
    "credit": ("Where does the reward land?", credit.METHODS),
    "segments": ("What counts as one action?", segments.METHODS),
    "advantages": ("How do returns become advantages?", advantages.METHODS),
    "loss": ("How do advantages become a gradient?", losses.METHODS),
    "preference": ("What does a reward model learn from people's rankings?", losses.PREFERENCES),
}
MODULES = {"loss": "losses", "preference": "losses"}  # where the package differs from the name


def main() -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only name the pages that would change")
    options = parser.parse_args()
    made = pages()
    stale = [name for name, text in made.items() if not _same(FOLDER / name, text)]
    written = [*FOLDER.glob("*.md"), *FOLDER.glob("images/*.svg")]
    unknown = sorted(str(p.relative_to(FOLDER)) for p in written if str(p.relative_to(FOLDER)) not in made)
    if options.check:
        print("\n".join([*stale, *unknown]) or "every page is up to date")
        return int(bool(stale or unknown))
    (FOLDER / "images").mkdir(parents=True, exist_ok=True)
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    print(f"{len(made)} pages, {len(stale)} of them new or changed")
    return 0


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def pages() -> dict[str, str]:
    """Return {path in docs/methods: text} of every page and picture, the index too."""
    found = {"README.md": index()}
    for field, (_, methods) in ROOMS.items():
        for name, factory in methods.items():
            drawn_figure = picture(field, name)
            if drawn_figure is not None:
                found[f"images/{field}-{name}.svg"] = drawn_figure
            found[f"{field}-{name}.md"] = page(field, name, factory, drawn_figure is not None)
    return found


def index() -> str:
    """Return the list of all pages."""
    lines = ["# Methods", "", "Drawn from the docstrings by `python tools/method_pages.py`.", ""]
    for field, (question, methods) in ROOMS.items():
        lines += [f"## `{field}`: {question}", "", "| name | what it is |", "|---|---|"]
        lines += [f"| [`{n}`]({field}-{n}.md) | {purpose(f)} |" for n, f in methods.items()]
        lines.append("")
    return "\n".join(lines)


def purpose(factory: Callable[..., Any]) -> str:
    """Return the first line of the file that holds a method: what it is for."""
    return (inspect.getmodule(factory).__doc__ or "").split("\n")[0]  # type: ignore[union-attr]


def page(field: str, name: str, factory: Callable[..., Any], drawn: bool) -> str:
    """Return the page of one method; `drawn` says whether it has a picture."""
    given = ", ".join(argument(p) for p in inspect.signature(factory).parameters.values())
    room = MODULES.get(field, field)
    parts = [
        f"# `{name}`",
        f"*{field}.* {purpose(factory)}",
        f"```python\nfrom apportion import {room}\n\n{room}.{name}({given})\n```",
        body(inspect.getdoc(factory) or ""),
        used_by(field, name),
        measured(field, name),
        pictured(field, name) if drawn else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def argument(parameter: inspect.Parameter) -> str:
    """Return a parameter as a call writes it: with its default, or the name of what is given in its place."""
    if parameter.default is inspect.Parameter.empty:
        return parameter.name
    return f"{parameter.name}={literal(parameter.default)}"


def literal(value: object) -> str:
    """Return a default as Python, strings in double quotes as the formatter wants them."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def body(doc: str) -> str:
    """Return a docstring as Markdown: indented formulas as code, arguments and errors as lists."""
    out: list[str] = []
    section = ""
    for block in doc.split("\n\n"):
        lines = block.split("\n")
        head = re.fullmatch(r"(Args|Raises):(.*)", lines[0])
        if head:
            section = {"Args": "Settings", "Raises": "Errors"}[head[1]]
            rest = [head[2].strip()] if head[2].strip() else []
            out.append(f"**{section}**\n\n" + _listed([*rest, *lines[1:]]))
        elif lines[0].startswith("    "):
            out.append("```text\n" + "\n".join(line.removeprefix("    ") for line in lines) + "\n```")
        else:
            marked = [re.sub(r"^(Sources?:|Assumes:|Use it (?:when|for:?))", r"\n**\1**", line) for line in lines]
            out.append("\n".join(marked).strip("\n"))
    return "\n\n".join(out)


def _listed(lines: list[str]) -> str:
    """Return `    name: text` lines as a list; deeper lines continue it."""
    items: list[str] = []
    for line in lines:
        text = line.strip()
        if not line.startswith("     ") and re.match(r"[\w, ]+: ", text):
            names, _, message = text.partition(": ")
            items.append(f"- `{names}`: {message}")
        elif items:
            items[-1] += f" {text}"
        else:
            items.append(f"- {text}")
    return "\n".join(items)


def used_by(field: str, name: str) -> str:
    """Return the named algorithms that hold this method."""
    if field == "preference":
        return ""
    users = [a for a, spec in ALGORITHMS.items() if name in [n for n, _ in parse(field, getattr(spec, field))]]
    return "**Algorithms that use it:** " + ", ".join(f"`{a}`" for a in users) if users else ""


def measured(field: str, name: str) -> str:
    """Return what a diagnosis found of this credit."""
    path = FOLDER / "measured.json"
    if field != "credit" or not path.is_file():
        return ""
    stored = json.loads(path.read_text(encoding="utf-8"))
    found = stored["diagnosis"]["methods"].get(name)
    if found is None:
        return ""
    rows = [
        ("cosine of its expected gradient with the true one", _range(found["cosine"])),
        ("bias, over the true gradient's length", _range(found["bias"])),
        ("signal along the true gradient over the noise of a batch", _range(found["useful_snr"], 3)),
        ("attention kept on the response", _number(found.get("credit/kept_mass"))),
        ("entropy of its shares, nats", _number(found.get("credit/share_entropy"))),
        ("extra ms a batch; forwards; backwards", _cost(found)),
    ]
    table = "\n".join(f"| {title} | {value} |" for title, value in rows)
    return f"## Measured here\n\n{stored['how']}\n\n| figure | value |\n|---|---|\n{table}"


def _cost(found: Mapping[str, Any]) -> str:
    return f"{found['extra_ms']:.0f}; {found['extra_forwards']}; {found['extra_backwards']}"


def _range(value: Mapping[str, float | None], digits: int = 2) -> str:
    if value["mean"] is None:
        return "does not rise above the noise"
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def pictured(field: str, name: str) -> str:
    """Return the section that shows a method's picture and says where the responses come from."""
    stored = json.loads((FOLDER / "responses.json").read_text(encoding="utf-8"))
    message, how = "Its credit", stored["how"]
    if field == "segments":
        message, how = "Its actions", how.partition(" Each picture")[0]
    return f"## {message} on the same three responses\n\n![{message}](images/{field}-{name}.svg)\n\n{how}"


def picture(field: str, name: str) -> str | None:
    """Return the credit of the three responses as shaded tokens, or a segmenter's actions; None for other methods."""
    path = FOLDER / "responses.json"
    if field not in ("credit", "segments") or not path.is_file():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    return (credit_picture if field == "credit" else segments_picture)(stored, name)


if __name__ == "__main__":
    sys.exit(main())
