"""The HTML document: one file with its styles, scripts and data inlined, and no network access."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from apportion.errors import DiskError

# ensure_ascii already writes U+2028/9 and every other non-ASCII character as \uXXXX.
_JSON_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def embed_json(name: str, value: Any) -> str:
    """Return `value` as a data block `<script type="application/json" id=name>` that its content cannot close.

    Raises:
        ValueError: `value` holds a NaN or an infinity, which JSON cannot carry.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(_JSON_ESCAPES)
    return f'<script type="application/json" id="{escape(name)}">{text}</script>'


def asset(name: str) -> str:
    """Return the text of a stylesheet or script that ships with the package."""
    return resources.files("apportion.report").joinpath("assets", name).read_text(encoding="utf-8")


def document(title: str, body: str, *, data: Mapping[str, Any], styles: Sequence[str], scripts: Sequence[str]) -> str:
    """Return the page: `body` is trusted HTML, `title` is text, `data` becomes JSON blocks, the rest is inlined.

    The content security policy allows scripts by hash, so that text from a model could not run even if it were to
    reach the page unescaped.
    """
    hashes = " ".join(_hash(script) for script in scripts)
    # Plotly sets style attributes and adds style rules while it draws, hence 'unsafe-inline' for styles only.
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{escape(title)}</title>",
        '<link rel="icon" href="data:,">',
        *(f"<style>\n{style}</style>" for style in styles),
        "</head>",
    ]
    blocks = [embed_json(name, value) for name, value in data.items()]
    tail = [*blocks, *(f"<script>{script}</script>" for script in scripts), "</body>", "</html>", ""]
    return "\n".join([*head, "<body>", body, *tail])


def write_page(html: str, output: Path) -> Path:
    """Write `html` to `output` atomically.

    Raises:
        DiskError: the folder cannot be made or written to.
    """
    output = Path(output)
    # Lone surrogates cannot be encoded as UTF-8; they become "?".
    raw = html.encode("utf-8", errors="replace")
    temporary: str | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
        os.chmod(temporary, 0o644)  # mkstemp creates files with mode 0600
        os.replace(temporary, output)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        fix = "Choose another --output, or make room and check the permissions."
        raise DiskError("output", f"{output} ({error})", "a place that can be written to", fix) from error
    return output


def _hash(script: str) -> str:
    # Browsers normalise line ends before they hash an inline script.
    text = script.replace("\r\n", "\n").replace("\r", "\n")
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") + "'"
