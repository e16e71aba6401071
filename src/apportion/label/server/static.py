"""Files of the page, read once; only these are served."""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import NamedTuple

KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


class StaticFile(NamedTuple):
    """A file: its bytes, its type, and an ETag of its contents."""

    body: bytes
    kind: str
    etag: str


def static_files() -> dict[str, StaticFile]:
    """Return {path within the page: file}; `base.css` is the report's, so that both look alike."""
    folder = resources.files("apportion.label").joinpath("static")
    found = {"base.css": resources.files("apportion.report").joinpath("assets", "base.css").read_bytes()}
    for entry in folder.iterdir():
        if entry.is_file():
            found[entry.name] = entry.read_bytes()
    for entry in folder.joinpath("js").iterdir():
        found[f"js/{entry.name}"] = entry.read_bytes()
    return {name: _file(name, body) for name, body in found.items() if name.rpartition(".")[2] in KINDS}


def _file(name: str, body: bytes) -> StaticFile:
    kind = f"{KINDS[name.rpartition('.')[2]]}; charset=utf-8"
    return StaticFile(body, kind, f'"{hashlib.sha256(body).hexdigest()[:20]}"')
