"""docs/architecture.md shows the loop of `stages/rl/train.py` as it is; lines with an ellipsis are abridged."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_loop_on_the_page_is_the_code():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    code = (ROOT / "src" / "apportion" / "stages" / "rl" / "train.py").read_text(encoding="utf-8")
    shown = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL))
    lines = [line.split("#")[0].strip() for line in shown.split("\n")]
    lines = [line for line in lines if line and "..." not in line]
    assert len(lines) >= 18
    assert [line for line in lines if line not in code] == []


def test_every_file_on_the_page_exists():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = set(re.findall(r"`((?:[a-z_]+/)*(?:[a-z_]+\.py|[a-z_]+/))`", page))
    known = {f.relative_to(ROOT / "src" / "apportion").as_posix() for f in (ROOT / "src" / "apportion").rglob("*.py")}
    known |= {f"{folder}/" for name in known for folder in [name.rpartition("/")[0], *name.split("/")[:-1]] if folder}
    assert len(places) > 30
    assert sorted(place for place in places if place not in known) == []
