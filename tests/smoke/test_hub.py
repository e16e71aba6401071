"""`--push_to_hub` against a hub on this machine: what is uploaded, what is refused first, what a failure leaves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import trainer_runs
from commands import Result, run_python
from hub_server import HubServer
from label_server import free_port

from apportion.cli.arguments import parse
from apportion.config import RLConfig
from apportion.errors import ConfigError
from apportion.stages.rl.train import train
from apportion.training.publish.hub import check_hub

Command = Callable[..., Result]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainer_runs.world(tiny_runs.world(tmp_path_factory.mktemp("world")))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def command(hub: HubServer, tmp_path: Path) -> Command:
    """Return the real command in a new process, since the hub's client reads the environment when it is imported."""

    def run(*words: object, token: str = "hf_write", **environment: str) -> Result:
        away = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address}
        away |= {"HF_HUB_DISABLE_XET": "1", **({"HF_TOKEN": token} if token else {})}
        return run_python("-m", "apportion", *words, cwd=tmp_path, **away, **environment)

    return run


def flags(world: Path, stage: str, run: Path, **changes: Any) -> list[str]:
    """Return the command line of a small run."""
    if stage == "rl":
        return ["rl", *tiny_runs.flags(world, run, **{"steps": 1} | changes)]
    if stage == "reward":
        more = {"model": world / "base", "data": world / "reviews.csv", "output": run, "excerpts": 16, "batch_size": 8}
        more |= {"probe_excerpts": 8, "test_texts": 10, "excerpt_tokens": "[4, 8]", "dtype": "float32"}
        return ["reward", *(str(word) for name, value in (more | changes).items() for word in (f"--{name}", value))]
    data = world / ("demonstrations.jsonl" if stage == "sft" else "pairs.jsonl")
    return [stage, *trainer_runs.flags(world, data, run, **{"steps": 1} | changes)]


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != ".gitattributes"}


@pytest.mark.parametrize(
    "stage", ["rl", *(pytest.param(one, marks=pytest.mark.long) for one in ("reward", "sft", "dpo"))]
)
def test_the_final_model_is_uploaded_with_its_card(
    world: Path, tmp_path: Path, hub: HubServer, command: Command, stage: str
) -> None:
    run = tmp_path / "run"
    words = flags(world, stage, run, push_to_hub="me/films")
    done = command(*words)
    done.assert_done()
    assert done.out == f"{run}\n" and "hf_write" not in done.err
    final = {str(path.relative_to(run / "final")): path.read_bytes() for path in (run / "final").rglob("*")}
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= final.keys()
    assert hashes(hub.files["me/films"]) == hashes(final) and hub.private == {"me/films": True}
    assert 'from_pretrained("me/films")' in final["README.md"].decode()
    record = json.loads((run / "hub.json").read_text())
    assert record["repository"] == "me/films" and record["commit"] == "a" * 40
    assert "hf_write" not in (run / "config.yaml").read_text()
    before = len(hub.requests)
    command(*words).assert_done()  # it is there already
    assert len(hub.requests) == before


def test_a_failed_upload_keeps_the_run_and_names_the_command_that_repeats_it(
    world: Path, tmp_path: Path, hub: HubServer, command: Command
) -> None:
    run = tmp_path / "run"
    hub.broken = "/api/repos/create"
    words = flags(world, "rl", run, push_to_hub="films")
    done = command(*words)
    assert done.code == 2 and "Traceback" not in done.err
    assert f"`hf upload films {run}/final . --private`" in done.err and "push_to_hub: got" in done.err
    assert json.loads((run / "status.json").read_text())["status"] == "finished" and not (run / "hub.json").exists()
    assert (run / "final" / "model.safetensors").is_file()
    steps = (run / "metrics.jsonl").read_bytes()
    hub.broken = ""
    done = command(*words, "--hub_private", "false")  # the same command uploads only
    done.assert_done()
    assert (run / "metrics.jsonl").read_bytes() == steps and hub.private == {"me/films": False}
    assert "model.safetensors" in hub.files["me/films"]


@pytest.mark.parametrize(
    ("repo", "token", "pieces"),
    [
        ("a/b/c", "hf_write", ("the name of a repository", "OWNER/NAME")),
        ("me/films", "", ("got 'no token'", "hf auth login")),
        ("me/films", "hf_wrong", ("Invalid user token", "a hub that accepts the token")),
        ("me/films", "hf_read", ("may only read", "may write")),
        ("me/films", "hf_odd", ("KeyError", "a hub that accepts the token", "HF_ENDPOINT")),
        ("me/films", "hf_away", ("ConnectError", "a hub that accepts the token", "HF_ENDPOINT")),
        ("other/films", "hf_write", ("a repository of me or team", "me/films")),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    tmp_path: Path, hub: HubServer, command: Command, repo: str, token: str, pieces: tuple[str, ...]
) -> None:
    program = (
        "import sys\nfrom apportion.training.publish.hub import check_hub\n"
        "try:\n    check_hub(sys.argv[1])\nexcept ValueError as error:\n    print(error)\n"
    )
    endpoint = hub.address if token != "hf_away" else f"http://127.0.0.1:{free_port()}"
    away = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
    done = run_python("-c", program, repo, cwd=tmp_path, **away, **({"HF_TOKEN": token} if token else {}))
    done.assert_done()
    assert done.out.startswith("push_to_hub: got") and all(piece in done.out for piece in pieces), done.out
    assert hub.files == {}


def test_the_check_comes_before_the_run_folder_and_fresh(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    config = parse(RLConfig, "rl", flags(world, "rl", run)[1:]).config
    train(config)
    weights = (run / "final" / "model.safetensors").read_bytes()
    config.push_to_hub = "me/films"
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE") as caught:  # no test may use the network
        train(config, fresh=True)
    assert caught.value.field == "push_to_hub"
    assert (run / "final" / "model.safetensors").read_bytes() == weights
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        check_hub("me/films")
