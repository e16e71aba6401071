"""Untrusted models, tables and run folders run no code and write no files outside the run folder."""

from __future__ import annotations

import ast
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from malformed_models import PLANTED, edited

from apportion.models.loading import load_causal
from apportion.models.pretrained import load_settings
from apportion.models.tokenizers import read_tokenizer
from apportion.system import safe_yaml

Command = Callable[..., Any]
ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "apportion").rglob("*.py"))
# calls that turn bytes or text into code; "load" and "loads" are those of pickle, marshal, shelve, torch, yaml, joblib
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "marshal.loads", "dill.load", "joblib.load",
    "torch.load", "torch.jit.load", "torch.hub.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "numpy.load",
    "os.system", "os.popen", "runpy.run_path",
}  # fmt: skip


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Yield (dotted name, call) of every call in a source file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_in_the_package_makes_code_of_what_it_reads() -> None:
    assert len(SOURCES) > 100
    found = {(path.name, name) for path in SOURCES for name, _ in calls(path) if name in FORBIDDEN}
    # the program of the sandbox runs what a model wrote, in a process without files, network or rights
    assert found == {("_sandboxed.py", "exec"), ("_sandboxed.py", "compile")}
    lines = [line.strip() for path in SOURCES for line in path.read_text(encoding="utf-8").splitlines()]
    modules = ("pickle", "marshal", "shelve", "dill", "cloudpickle")
    assert not [
        line for line in lines if line.startswith(tuple(f"{w} {m}" for w in ("import", "from") for m in modules))
    ]
    shells = [path.name for path in SOURCES for _, call in calls(path) for word in call.keywords if word.arg == "shell"]
    assert not shells


def test_every_model_is_loaded_without_its_code() -> None:
    """Each from_pretrained and from_config passes NO_CODE, or is peft's own: it reads JSON or adapts a loaded model."""
    seen = 0
    for path in SOURCES:
        if path.name == "convert.py" or "bench" in path.parts:  # the built-in file, checked by SHA-256; our own models
            continue
        for name, call in calls(path):
            if name.endswith((".from_pretrained", ".from_config")) and not name.startswith("Peft"):
                seen += 1
                spread = [ast.unparse(word.value) for word in call.keywords if word.arg is None]
                assert "NO_CODE" in spread or "loading" in spread, f"{path.name}:{call.lineno}"
    assert seen >= 6


def test_a_model_with_custom_code_is_loaded_without_it(
    tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny.save_policy(tmp_path / "model")
    (model / "code.py").write_text(PLANTED)
    edited(model / "config.json", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    edited(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", None]})
    assert type(load_settings("policy", str(model))).__name__ == "LlamaConfig"
    loaded = load_causal("policy", str(model), torch.float32, torch.device("cpu"))
    assert type(loaded).__name__ == "LlamaForCausalLM"
    read_tokenizer("policy", str(model))
    assert not list(tmp_path.rglob("planted-code-ran"))


class Planted:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("planted-code-ran"),)


def test_no_pickle_in_a_model_is_ever_opened(
    model_command: Command, tmp_path: Path, tiny: Any, rl_flags: list[str]
) -> None:
    model = tiny.save_policy(tmp_path / "model")
    for name in ("pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth"):
        (model / name).write_bytes(pickle.dumps(Planted()))
    model_command("rl", *rl_flags, "--policy", model).assert_done()
    assert not list(tmp_path.rglob("planted-code-ran"))
    assert {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()} <= {
        ".yaml", ".json", ".jsonl", ".md", ".safetensors", ".jinja",
    }  # fmt: skip


LINKS = {
    "metrics.jsonl": "stolen.jsonl",
    "rollouts.jsonl": "../outside/stolen.jsonl",
    "checkpoints": "../outside",
    "final": "../outside",
    "bad_rows.jsonl": "/nowhere/at/all",
}


@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_the_run_folder_is_refused(
    command: Command, tmp_path: Path, rl_flags: list[str], name: str
) -> None:
    """A run folder that somebody else prepared: what is written to it may not land anywhere else."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "stolen.jsonl").write_text("mine\n")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("{}\n")
    (run / "status.json").write_text('{"stage": "rl", "status": "running"}\n')
    (run / name).symlink_to(LINKS[name] if name != "metrics.jsonl" else tmp_path / "outside" / "stolen.jsonl")
    refused = command("rl", *rl_flags)
    assert refused.code == 2 and f"output: got 'run/{name}, a link to" in refused.err and "Remove it" in refused.err
    assert refused.loads_nothing
    assert (tmp_path / "outside" / "stolen.jsonl").read_text() == "mine\n"
    assert os.listdir(tmp_path / "outside") == ["stolen.jsonl"]
    status = json.loads((run / "status.json").read_text()) | {"status": "finished"}
    (run / "status.json").write_text(json.dumps(status))
    (run / "final").exists() or (run / "final").mkdir()
    done = command("evaluate", "--run", "run")
    assert done.code == 2 and "a link to" in done.err and done.loads_nothing


def test_a_run_folder_on_another_disk_and_links_inside_it_are_fine(
    model_command: Command, tmp_path: Path, rl_flags: list[str]
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    model_command("rl", *rl_flags).assert_done()
    assert (tmp_path / "disk" / "final" / "model.safetensors").is_file()
    (tmp_path / "disk" / "newest.jsonl").symlink_to("metrics.jsonl")
    model_command("rl", *rl_flags).assert_done()


def test_an_output_that_climbs_is_the_users_own_choice_and_stays_in_its_folder(
    model_command: Command, tmp_path: Path, rl_flags: list[str]
) -> None:
    (tmp_path / "here").mkdir()
    before = set(os.listdir(tmp_path))
    model_command("rl", *rl_flags, "--output", "here/../there/run").assert_done()
    assert set(os.listdir(tmp_path)) - before == {"there"}
    assert set(os.listdir(tmp_path / "there")) == {"run", ".run.lock"}


def test_names_from_a_model_write_no_file_elsewhere(
    model_command: Command, tmp_path: Path, tiny: Any, rl_flags: list[str]
) -> None:
    """A tokenizer's named chat templates are saved as files of their names."""
    model = tiny.save_policy(tmp_path / "model")
    templates = [{"name": "default", "template": "x"}, {"name": "../../../outside", "template": "planted"}]
    edited(model / "tokenizer_config.json", chat_template=templates)
    done = model_command("rl", *rl_flags, "--policy", model)
    done.assert_refused("policy: got", "a chat template named '../../../outside'")
    assert not list(tmp_path.rglob("outside*"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('touch planted-code-ran') }}", "unsafe"),
        ("{% include 'config.json' %}", "loader"),
    ],
)
def test_a_chat_template_reaches_nothing(
    model_command: Command, tmp_path: Path, tiny: Any, rl_flags: list[str], template: str, message: str
) -> None:
    model = tiny.save_policy(tmp_path / "model")
    edited(model / "tokenizer_config.json", chat_template=template)
    (tmp_path / "p.jsonl").write_text('{"prompt": [{"role": "user", "content": "hello"}]}\n')
    done = model_command("rl", *rl_flags, "--policy", model, "--prompts", "p.jsonl")
    done.assert_refused("prompts: got", message)
    assert not list(tmp_path.rglob("planted-code-ran"))


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.getcwd []", "!!python/name:os.getcwd", "!!python/module:os", "!!python/tuple [1]"],
)
def test_yaml_makes_plain_values_only(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        safe_yaml.load(text)


def test_yaml_is_bounded_and_its_aliases_are_not_refused() -> None:
    assert safe_yaml.load("a: &x {k: 1}\nb: {<<: *x, m: 2}\n") == {"a": {"k": 1}, "b": {"k": 1, "m": 2}}
    assert safe_yaml.load(safe_yaml.dump({"a": "1e-4", "b": 1e-4})) == {"a": "1e-4", "b": 1e-4}
    deeper = [f"b{i}: &b{i} [*b{i - 1}]" for i in range(1, 60)]
    with pytest.raises(safe_yaml.Excess):
        safe_yaml.load("\n".join(["b0: &b0 [1]", *deeper]))


def test_recipes_ask_for_no_code() -> None:
    for recipe in (ROOT / "recipes").rglob("*.yaml"):
        assert "trust_remote_code" not in recipe.read_text(), recipe


def test_a_terminal_is_sent_no_control_characters(model_command: Command, tmp_path: Path, world: Path) -> None:
    text = "fine \x1b]0;owned\x07 film \x1b[2J"
    done = model_command("credit", "--model", world / "reward", "--text", text, "--method", "uniform")
    done.assert_done()
    assert "\x1b" not in done.out and "\x07" not in done.out and "fine" in done.out
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": ["\x1b[2J"]}) + "\n")
    models = ("--reward_model", world / "reward", "--policy", world / "policy")
    refused = model_command("rl", *models, "--prompts", "p.jsonl")
    assert refused.code == 2 and "\x1b" not in refused.err
