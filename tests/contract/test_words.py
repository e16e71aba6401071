"""Code and documents use the field's words, not those of a private dialect (`tools/words.py` has the list)."""

from __future__ import annotations

import tokenize
from io import StringIO
from pathlib import Path

from tools import words


def test_no_word_of_the_dialect_is_left():
    found = [str(use) for path in words.files() for use in words.uses(path)]
    assert not found, "\n".join(["", *found])


def test_words_are_located(tmp_path):
    """Names in code, phrases in comments and strings over line ends; no phrase across code."""
    text = (
        '"""What it does."""\n\ndef tell(file):\n    # the run go'
        + 'es\n    # on\n    file.tell()\n    return "go", "on"\n'
    )
    path = Path(tmp_path, "module.py")
    path.write_text(text)
    assert [(use.line, use.word) for use in words.uses(path, tmp_path)] == [
        (1, "What …"),
        (3, "tell"),
        (4, "go" + "es on"),
    ]


def test_prose_keeps_its_lines():
    text = "value = 1  # a comment\nname = 'text'\n"
    tokens = list(tokenize.generate_tokens(StringIO(text).readline))
    shown = words.prose(text, tokens)
    assert shown.count("\n") == 2 and "a comment" in shown and "value" not in shown
