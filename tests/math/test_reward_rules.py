"""Verifiable rules on texts with known answers, and the sandbox on programs that try to leave it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from apportion.compatibility.rewards import FROM_REWARD_MODEL
from apportion.errors import ConfigError, DataError, ScoreError
from apportion.evidence import PRODUCERS
from apportion.rewards import RULE_FACTORIES
from apportion.rewards.sandbox import NoSandbox, passed


def scores(
    name: str, texts: list[str], rows: list[dict[str, Any]] | None = None, **settings: Any
) -> list[float | None]:
    rule = RULE_FACTORIES[name](**settings)
    return rule.score(texts, rows or [{}] * len(texts))


@pytest.mark.parametrize(
    ("text", "answer", "settings", "score"),
    [
        ("so it is #### 42", "42", {}, 1.0),
        ("so it is #### 42 \nNext question", "42", {}, 1.0),
        ("#### 41 no, #### 42", "42", {}, 1.0),  # the last one counts
        ("so it is 42", "42", {}, 0.0),
        ("####", "42", {}, 0.0),
        ("#### 42", "It costs 6*7.\n#### 42", {}, 1.0),  # GSM8K's own column
        ("#### 1,234", "1234", {}, 0.0),
        ("#### $1,234.", "1234.0", {"numbers": True}, 1.0),
        ("#### nan", "nan", {"numbers": True}, 1.0),  # compared as text
        ("Answer: Rome", "Rome", {"marker": "Answer:"}, 1.0),
        (" Rome ", "Rome", {"marker": ""}, 1.0),
        ("#### 42", 42, {}, 1.0),
    ],
)
def test_exact(text: str, answer: Any, settings: dict[str, Any], score: float) -> None:
    assert scores("exact", [text], [{"answer": answer}], **settings) == [score]


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("The answer is $\\frac{1}{2}$.", "0.5", 1.0),
        ("so \\boxed{\\frac{2}{4}}", "\\frac{1}{2}", 1.0),
        ("it is 1/2", "0.5", 1.0),
        ("$x = 3$", "3", 1.0),
        ("$\\{1, 2\\}$", "$\\{2, 1\\}$", 1.0),
        ("it is 0.4", "0.5", 0.0),
        ("no idea", "0.5", 0.0),
        ("", "0.5", 0.0),
    ],
)
def test_math(text: str, answer: str, score: float) -> None:
    assert scores("math", [text], [{"answer": answer}]) == [score]


def test_math_refuses_an_answer_that_is_none() -> None:
    rule = RULE_FACTORIES["math"]()
    with pytest.raises(DataError, match="an answer that math-verify can parse"):
        rule.check({"answer": "???"})
    with pytest.raises(DataError) as caught:
        rule.score(["1", "2"], [{"answer": "1"}, {"answer": "???"}])
    assert caught.value.row == 1
    RULE_FACTORIES["math"](marker="####").check({"answer": "six times seven\n#### 42"})


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("text", "settings", "score"),
    [
        ('{"n": 3}', {"schema": SCHEMA}, 1.0),
        (' [1, {"a": null}]\n', {}, 1.0),
        ('{"n": 3.5}', {"schema": SCHEMA}, 0.0),
        ('{"n": 3} and more', {"schema": SCHEMA}, 0.0),
        ("{'n': 3}", {}, 0.0),
        ('{"n": NaN}', {}, 0.0),
        ("3", {}, 0.0),  # JSON by accident
        ("3", {"schema": {"type": "integer"}}, 1.0),
        ("[" * 100_000, {}, 0.0),
        ('Here:\n```json\n{"n": 3}\n```\nDone.', {"schema": SCHEMA, "fenced": True}, 1.0),
        ('{"n": 3}', {"schema": SCHEMA, "fenced": True}, 0.0),
        (' {"n": 3}\nQuestion:', {"schema": SCHEMA, "prefix": True}, 1.0),
        ('so {"n": 3}', {"schema": SCHEMA, "prefix": True}, 0.0),
    ],
)
def test_json(text: str, settings: dict[str, Any], score: float) -> None:
    assert scores("json", [text], **settings) == [score]


def test_json_schemas_from_a_file_and_from_a_column(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "array"}')
    assert scores("json", ["[]", "{}"], schema=str(tmp_path / "schema.json")) == [1.0, 0.0]
    rows: list[dict[str, Any]] = [
        {"form": {"type": "array"}},
        {"form": '{"type": "object"}'},
        {"form": {"type": "object"}},
    ]
    assert scores("json", ["[]", "[]", "{}"], rows, column="form") == [1.0, 0.0, 1.0]
    with pytest.raises(DataError, match="a JSON schema"):
        RULE_FACTORIES["json"](column="form").check({"form": "{"})
    with pytest.raises(ConfigError, match="rewards.json.schema"):
        RULE_FACTORIES["json"](schema=str(tmp_path / "absent.json"))


def test_a_schema_elsewhere_is_never_fetched() -> None:
    rule = RULE_FACTORIES["json"](schema={"$ref": "http://127.0.0.1:9/schema.json"})
    with pytest.raises(ConfigError, match="references are inside it"):
        rule.score(["[]"], [{}])


@pytest.mark.parametrize(
    ("text", "settings", "score"),
    [
        ("abc\n", {"pattern": "[a-c]+"}, 1.0),
        ("abcd", {"pattern": "[a-c]+"}, 0.0),
        ("abcd", {"pattern": "[a-c]+", "whole": False}, 1.0),
        ("<think>\nso\n</think>\n42", {"pattern": r"(?s)<think>.*</think>\s*\d+"}, 1.0),
    ],
)
def test_regex(text: str, settings: dict[str, Any], score: float) -> None:
    assert scores("regex", [text], **settings) == [score]


ADD = "```python\ndef add(a, b):\n    return a + b\n```"


def test_programs_and_their_tests() -> None:
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(1, 1) == 3"]
    rows = [{"tests": tests[:2]}, {"tests": tests}, {"tests": tests[0]}, {"tests": tests[:2]}, {"tests": tests[:2]}]
    texts = [ADD, ADD, ADD, "def add(a, b): return 3", "I cannot."]
    assert scores("tests", texts, rows) == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert scores("tests", texts, rows, partial=True) == [1.0, pytest.approx(2 / 3), 1.0, 0.5, 0.0]
    with pytest.raises(DataError, match="a list of tests"):
        RULE_FACTORIES["tests"]().check({"tests": [1]})


LIMITS: dict[str, Any] = {"seconds": 1.0, "memory": 256.0}
OUTSIDE = {  # what a program must not do, each possible without the lock
    "read": "open('/etc/passwd').read()",
    "list": "import os; os.listdir('/')",
    "environment": "open('/proc/self/environ', 'rb').read()",
    "write": "import os; open(os.path.join(FOLDER, 'written'), 'w').write('x')",
    "remove": "import os; os.unlink(os.path.join(FOLDER, 'there'))",
    "rights": "import os; os.chmod(os.path.join(FOLDER, 'there'), 0o600)",
    "times": "import os; os.utime(os.path.join(FOLDER, 'there'))",
    "socket": "import socket; socket.socket()",
    "process": "import subprocess; subprocess.run(['true'], check=True)",
    "fork": "import os; (os.fork() == 0 and os._exit(0))",
    "signal": "import os; os.kill(os.getppid(), 0)",
    "limits": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))",
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_program_cannot_leave_the_sandbox(name: str, tmp_path: Path) -> None:
    program = f"FOLDER = {str(tmp_path)!r}"
    for python, count in ((None, 0), ([sys.executable], 1)):  # locked, and as any process
        (tmp_path / "there").write_text("x")
        assert passed(program, [OUTSIDE[name]], python=python, **LIMITS) == count, python
        assert (tmp_path / "there").exists() == (python is None or name != "remove")
        assert not (tmp_path / "written").exists() or python is not None


@pytest.mark.parametrize(
    ("program", "tests", "count"),
    [
        ("while True: pass", ["True"], 0),
        ("import time; time.sleep(60)", ["True"], 0),
        ("x = bytearray(1 << 30)", ["True"], 0),
        ("import os; os._exit(0)", ["True"], 0),
        ("raise SystemExit", ["True"], 0),
        ("def broken(:", ["True"], 0),
        ("", ["True", "import sys; sys.exit()", "import ctypes; ctypes.string_at(0)", "True"], 1),
        ("print('x ready'); print('x 0')", ["assert False"], 0),
        ("import collections, json, math, random, re, datetime, decimal", ["assert math.pi > 3", "random.random()"], 2),
        ("import threading; t = threading.Thread(target=print); t.start(); t.join()", ["True"], 1),
    ],
)
def test_what_ends_a_program_passes_no_test(program: str, tests: list[str], count: int) -> None:
    assert passed(program, tests, **LIMITS) == count


def test_without_a_sandbox_nothing_is_run_and_nothing_is_a_reward(tmp_path: Path) -> None:
    with pytest.raises(NoSandbox, match="cannot be started"):
        passed("", ["True"], python=[str(tmp_path / "absent")], **LIMITS)
    with pytest.raises(ConfigError, match="no sandbox"):
        RULE_FACTORIES["tests"](python=["false"])
    from apportion.rewards.sandbox import checked

    with pytest.raises(ScoreError, match="of rollout 3") as caught:
        checked("", ["True"], 3, python=["false"], **LIMITS)
    assert caught.value.row == 3


def test_the_evidence_that_only_a_reward_model_makes_is_that_of_its_producers() -> None:
    made = {name for key in ("reward", "attribution", "shapley") for name in PRODUCERS[key].provides} - {"scores"}
    others = {
        name
        for key, one in PRODUCERS.items()
        if key not in ("reward", "attribution", "shapley")
        for name in one.provides
    }
    assert all(name.startswith(FROM_REWARD_MODEL) for name in made)
    assert not any(name.startswith(FROM_REWARD_MODEL) for name in others)
