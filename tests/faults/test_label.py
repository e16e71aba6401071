"""`apportion label` on bad settings, samples and databases, and its server on bad requests: named, with the fix."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from commands import SHAPE, Result
from label_server import HEADERS, Client, LabelServer, write_samples

from apportion.errors import ConfigError
from apportion.label.export import ranking_rows
from apportion.label.server.access import make_access
from apportion.label.store import open_store
from apportion.label.store.schema import VERSION

Command = Callable[..., Result]
TOKEN = "a-token-of-some-length"


def faults(done: Result, *parts: str) -> list[str]:
    """Return how a command's end differs from one message of the usual shape that names `parts`; [] for such a one."""
    found = [] if done.code == 2 else [f"exit code {done.code}"]
    found += [f"printed {done.out!r}"] if done.out else []
    found += [] if SHAPE.fullmatch(done.err) else [f"no such message: {done.err!r}"]
    return found + [f"{part!r} is not in {done.err!r}" for part in parts if part not in done.err]


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    return write_samples(tmp_path / "samples.jsonl", 3)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--host", "0.0.0.0"], ["token", "APPORTION_LABEL_TOKEN"]),
        (["--public_url", "https://rank.example.org"], ["token"]),
        (["--host", "0.0.0.0", "--token", "short"], ["token", "at least 16"]),
        (["--token", TOKEN, "--public_url", "rank.example.org/x"], ["public_url"]),
        (["--port", "70000"], ["port"]),
        (["--guidelines", "absent.md"], ["guidelines", "absent.md"]),
        (["--tls_key", "samples.jsonl"], ["tls_certificate"]),
        (["--tls_certificate", "absent.pem"], ["tls_certificate"]),
        (["--overlap", "2"], ["overlap"]),
        (["--overlap_annotators", "1"], ["overlap_annotators"]),
        (["--database", "nowhere://x"], ["database"]),
        (["--database", "missing/labels.db"], ["database", "unable to open"]),
        (["--database", "samples.jsonl"], ["database", "not a database"]),
        (["--database", "postgresql://nobody@127.0.0.1:1/x"], ["database", "reached"]),
        (["--fresh"], ["--fresh", "never removed"]),
        (["--data", "absent.jsonl"], ["data", "absent.jsonl"]),
        (["export", "--database", "absent.db"], ["database", "absent.db"]),
        (["export", "--output", "rankings.csv"], ["output", ".jsonl"]),
        (["export", "--form", "pairs", "--replaced", "true"], ["replaced"]),
        (["exprot"], ["label exprot", "label export"]),
        (["results", "--database", "absent.db"], ["database"]),
    ],
)
def test_settings_that_cannot_work_are_named(
    command: Command, samples: Path, arguments: list[str], parts: list[str]
) -> None:
    serves = arguments[0].startswith("-") and "--data" not in arguments
    assert faults(command("label", *arguments, *(["--data", samples] if serves else [])), *parts) == []


def test_help_and_wrong_settings_load_no_server_and_no_model_library(command: Command) -> None:
    for arguments in (["--help"], ["export", "--help"], ["import", "--help"], ["--potr", "1"]):
        assert command("label", *arguments).loads_nothing


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([{"prompt": "p", "completions": ["only one"]}], ["1 completion", "2 to 12"]),
        ([{"prompt": "p", "completions": list("abcdefghijklm")}], ["13 completions"]),
        ([{"prompt": "p", "completions": "a text"}], ["a list of answers"]),
        ([{"prompt": "p", "completions": ["a", None]}], ["completions[1]"]),
        ([{"prompt": "p", "completions": ["a", 7]}], ["completions[1]"]),
        ([{"prompt": None, "completions": ["a", "b"]}], ["prompt"]),
        ([{"prompt": [{"role": "user"}], "completions": ["a", "b"]}], ["content"]),
        ([{"completions": ["a", "b"]}], ["a column 'prompt'"]),
        ([{"prompt": "p", "completion": ["a", "b"]}], ["a column 'completions'"]),
        ([{"prompt": "p", "completions": ["a", "b"], "item": "x" * 200}], ["at most 128"]),
        (
            [
                {"item": "1", "prompt": "p", "completions": ["a", "b"]},
                {"item": 1, "prompt": "q", "completions": ["a", "b"]},
            ],
            ["line 2", "line 1", "other texts"],
        ),
    ],
)
def test_rows_that_cannot_be_ranked_are_named(
    command: Command, tmp_path: Path, rows: list[dict[str, Any]], parts: list[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert faults(command("label", "--data", "rows.jsonl"), "data: got", *parts) == []
    assert not (tmp_path / "labels.db").exists(), "nothing was begun"


def test_a_database_of_a_newer_version_of_something_else_or_without_items_is_refused(
    command: Command, tmp_path: Path, samples: Path
) -> None:
    open_store(str(tmp_path / "newer.db"), create=True).close()
    with sqlite3.connect(tmp_path / "newer.db") as connection:
        connection.execute("UPDATE label_meta SET value = ? WHERE name = 'version'", (VERSION + 1,))
    connection.close()
    for arguments in (["--data", samples], ["export"], ["results"]):
        done = command("label", *arguments, "--database", "newer.db")
        assert faults(done, f"of version {VERSION + 1}", "Update apportion") == []
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE notes (text)")
    connection.close()
    assert faults(command("label", "export", "--database", "other.db"), "without rankings") == []
    assert faults(command("label", "--database", "empty.db"), "without items", "--data") == []


def test_a_read_only_database_is_refused_at_the_start_and_can_still_be_exported(
    command: Command, tmp_path: Path, samples: Path
) -> None:
    open_store(str(tmp_path / "labels.db"), create=True).close()
    url = "sqlite:///file:labels.db?mode=ro&uri=true"
    assert faults(command("label", "--data", samples, "--database", url), "readonly", "permissions") == []
    done = command("label", "export", "--database", url)
    assert done.code == 0, done.err
    assert (tmp_path / "rankings.jsonl").read_text() == ""


def test_a_locked_database_is_refused_at_the_start(command: Command, tmp_path: Path, samples: Path) -> None:
    open_store(str(tmp_path / "labels.db"), create=True).close()
    other = sqlite3.connect(tmp_path / "labels.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert faults(command("label", "--data", samples), "locked", "Close the program") == []
    other.close()


def test_a_port_that_is_taken_is_named(command: Command, samples: Path, tmp_path: Path) -> None:
    with LabelServer(tmp_path, "--data", samples, "--database", tmp_path / "first.db") as server:
        assert faults(command("label", "--data", samples, "--port", server.port), "port", "Use another --port") == []


def test_a_password_is_never_shown(command: Command, samples: Path) -> None:
    done = command("label", "--data", samples, "--database", "postgresql://labels:secret123@127.0.0.1:1/x")
    assert faults(done, "labels:***@") == []
    assert "secret123" not in done.err


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelServer]:
    folder = tmp_path_factory.mktemp("server")
    data = write_samples(folder / "samples.jsonl", 30)
    with LabelServer(
        folder, "--data", data, "--database", folder / "labels.db", "--annotators", "[Ann, Bob]"
    ) as started:
        yield started


def error(response: httpx.Response, status: int) -> dict[str, str]:
    """Return the error of a response, checked for its form and its headers."""
    assert response.status_code == status, response.text
    found: dict[str, str] = response.json()["error"]
    assert set(found) == {"field", "got", "expected", "fix"} and all(found.values())
    assert "Traceback" not in response.text and "site-packages" not in response.text
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    return found


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({}, "Origin"),  # a form of another site cannot set the header
        (HEADERS | {"Origin": "https://evil.example"}, "Origin"),
        (HEADERS | {"Origin": "null"}, "Origin"),
        (HEADERS | {"Sec-Fetch-Site": "cross-site"}, "Origin"),
        (HEADERS | {"Sec-Fetch-Site": "same-site"}, "Origin"),
        (HEADERS | {"Host": "rebound.example"}, "Host"),
    ],
)
def test_requests_of_other_sites_are_refused(server: LabelServer, headers: dict[str, str], field: str) -> None:
    response = httpx.post(f"{server.address}/api/session", json={"name": "Ann"}, headers=headers)
    assert error(response, 403)["field"] == field
    assert "set-cookie" not in response.headers


def test_sessions_are_http_only_same_site_and_cannot_be_forged(server: LabelServer) -> None:
    response = httpx.post(f"{server.address}/api/session", json={"name": "Ann"}, headers=HEADERS)
    cookie = response.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    name, value = next(iter(response.cookies.items()))
    for forged in ("", "1", value[:-1] + ("0" if value[-1] != "0" else "1"), "2" + value[1:], "x.y.z", "1.9999999999."):
        answer = httpx.post(f"{server.address}/api/work", json={}, headers=HEADERS | {"Cookie": f"{name}={forged}"})
        assert error(answer, 401)["fix"] == "Sign in."


@pytest.mark.parametrize("name", ["Anne", "", "   ", "x" * 80, "a\tb\x07"])
def test_an_unknown_annotator_is_refused_by_name(server: LabelServer, name: str) -> None:
    response = httpx.post(f"{server.address}/api/session", json={"name": name}, headers=HEADERS)
    found = error(response, 422)
    assert found["field"] == "annotator"
    if name == "Anne":
        assert "Ann" in found["fix"]


def test_large_requests_are_refused_whatever_their_headers_say(server: LabelServer) -> None:
    large = json.dumps({"name": "x" * 100_000}).encode()
    assert error(httpx.post(f"{server.address}/api/session", content=large, headers=HEADERS), 413)

    def pieces() -> Iterator[bytes]:
        for _ in range(200):
            yield b"x" * 1000

    assert error(httpx.post(f"{server.address}/api/session", content=pieces(), headers=HEADERS), 413)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'{"id": "short", "item": "x"}', b'{"id": "abcdefgh", "item": "x", "more": 1}',
        b'{"id": "abcdefgh", "item": "x", "ranks": ["1", "2"]}', b'{"id": "abcdefgh", "item": "x", "ranks": [1.5, 2]}',
        b'{"id": "abcdefgh", "item": "x", "ranks": [true, 2]}', b'{"id": "abcdefgh", "item": "x", "ranks": [0, 1]}',
        b'{"id": "abcdefgh", "item": "x", "seconds": NaN}', b'{"id": "<script>", "item": "x"}',
        b'{"id": "abcdefgh", "item": "x", "kind": "delete"}', b"\xff\xfe",
    ],
)  # fmt: skip
def test_bodies_that_are_no_answer_are_refused(server: LabelServer, body: bytes) -> None:
    http = Client(server, "Bob").http
    headers = {"Content-Type": "application/json"}
    response = http.post("/api/answers", content=body, headers=headers)
    assert response.status_code in (400, 422), response.text
    assert "error" in response.json() and "Traceback" not in response.text


def test_contradictory_answers_are_named_and_nothing_is_lost(server: LabelServer) -> None:
    ann = Client(server, "Ann")
    item = ann.work(1)[0]["item"]
    assert ann.answer("contra-01", item, [1, 2, 3], seconds=3.5).json()["outcome"] == "saved"
    assert ann.answer("contra-01", item, [1, 2, 3]).json()["outcome"] == "known"
    assert error(ann.answer("contra-01", item, [3, 2, 1]), 422)["field"] == "id"
    assert error(ann.answer("contra-02", item, [3, 2, 1]), 409)["expected"] == "one ranking of an item by a person"
    assert error(ann.answer("contra-03", item, [1, 1]), 422)["field"] == "ranks"
    assert error(ann.answer("contra-04", "no such item", [1, 2, 3]), 422)["field"] == "item"
    assert error(
        ann.http.post("/api/answers", json={"id": "contra-05", "item": item, "kind": "skip", "ranks": [1]}), 422
    )
    store = open_store(str(server.folder / "labels.db"))
    rows = [row for row in ranking_rows(store, every=True) if row["item"] == item]
    store.close()
    assert [(row["status"], row["seconds"]) for row in rows] == [("current", 3.5), ("refused", 0.0)]


def test_a_database_that_is_locked_for_a_while_costs_no_ranking(server: LabelServer) -> None:
    ann = Client(server, "Ann")
    item = ann.work(1)[0]["item"]
    other = sqlite3.connect(server.folder / "labels.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    response = ann.answer("locked-01", item, [1, 2, 3])
    assert "locked" in error(response, 503)["got"] and response.headers["retry-after"]
    assert time.monotonic() - began > 3, "it waited for the other program"
    other.execute("ROLLBACK")
    other.close()
    assert ann.answer("locked-01", item, [1, 2, 3]).json()["outcome"] == "saved"


def test_only_the_files_of_the_page_are_served(server: LabelServer) -> None:
    for path in (
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/js/../../items.py",
        "/labels.db",
        "/docs",
        "/openapi.json",
    ):
        assert error(httpx.get(server.address + path), 404)
    page = httpx.get(server.address + "/")
    assert "unsafe" not in page.headers["content-security-policy"]
    assert httpx.get(server.address + "/static/js/main.js").headers["content-type"].startswith("text/javascript")
    style = f"{server.address}/static/label.css"
    again = httpx.get(style, headers={"If-None-Match": httpx.get(style).headers["etag"]})
    assert again.status_code == 304 and "content-security-policy" in again.headers


def test_a_page_beyond_this_machine_demands_its_token_and_the_key_of_the_results(tmp_path: Path) -> None:
    data = write_samples(tmp_path / "samples.jsonl", 2)
    arguments = ("--data", data, "--database", tmp_path / "labels.db", "--host", "0.0.0.0")
    with LabelServer(tmp_path, *arguments, APPORTION_LABEL_TOKEN=TOKEN) as server:
        for token in ("", "another token, as long"):
            response = httpx.post(
                f"{server.address}/api/session", json={"name": "Ann", "token": token}, headers=HEADERS
            )
            assert error(response, 403)["field"] == "token"
        assert httpx.get(f"{server.address}/api/study").json()["guidelines"] == ""
        assert Client(server, "Ann", TOKEN).work(1)
        assert httpx.get(f"{server.address}/results").status_code == 403
        key = server.output.read_text().split("?key=")[1].split()[0]
        assert httpx.get(f"{server.address}/results", params={"key": key}).status_code == 200
        assert TOKEN not in server.output.read_text()
        assert "unencrypted" in server.output.read_text()
        assert server.stop() == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.9"])
def test_this_machine_alone_needs_no_token(host: str) -> None:
    assert make_access("s", "x", host=host, port=1, token=None, environment={}).public is False


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_every_other_address_needs_one(host: str) -> None:
    with pytest.raises(ConfigError, match="token"):
        make_access("s", "x", host=host, port=1, token=None, environment={})
