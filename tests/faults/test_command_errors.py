"""Wrong flags, values and methods on the command line: one message, exit code 2, and no model library loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from apportion.cli.main import COMMANDS

Command = Callable[..., Any]
LISTED = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
PROBE = """
import sys
from apportion.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as done:
    code = done.code or 0
import json
sys.stderr.write("LOADED " + json.dumps([m for m in {listed!r} if m in sys.modules]) + "\\n")
sys.exit(code)
"""


def test_the_real_command_refuses_and_loads_no_model_library(python: Command) -> None:
    """Help and flags need not even torch, so that they answer at once."""
    for arguments, code, loaded in (
        (["rl", "--reward_model", "x", "--credit", "atention"], 2, ["torch"]),
        (["rl", "--help"], 0, []),
        (["reward", "--step", "3"], 2, []),
    ):
        done = python("-c", PROBE.format(listed=LISTED), *arguments)
        assert json.loads(done.err.partition("LOADED ")[2]) == loaded
        assert done.code == code


def test_version_and_help(command: Command) -> None:
    done = command("--version")
    done.assert_done()
    assert done.out.startswith("apportion ") and done.out.count("\n") == 1
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        done = command(*arguments)
        done.assert_done()
        assert all(name in done.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_loads_no_model_library(command: Command, name: str) -> None:
    done = command(name, "--help")
    done.assert_done()
    assert done.out and done.loads_nothing


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["rll"], ["command: got 'rll'", "algorithms, credit, demo", "Did you mean 'rl'"]),
        (["--dry"], ["command: got '--dry'"]),
        (["rl", "--stepz", "3"], ["flag: got '--stepz'", "Did you mean '--steps'"]),
        (["rl", "--ppo.epoch=1"], ["flag: got '--ppo.epoch'", "Did you mean '--ppo.epochs'"]),
        (["reward", "--credit", "uniform"], ["flag: got '--credit'", "--excerpts"]),
        (["evaluate", "--runn", "x"], ["flag: got '--runn'", "Did you mean '--run'"]),
        (["rl", "steps", "3"], ["argument: got 'steps'", "--name value"]),
        (["algorithms", "abc"], ["argument: got 'abc'", "no arguments"]),
        (["rl", "--steps"], ["--steps: got 'nothing'", "expected a value", "--steps VALUE"]),
        (["rl", "--reward_model", "--steps", "3"], ["--reward_model: got 'nothing'", "expected a value"]),
        (["rl", "--fresh=yes"], ["--fresh: got 'yes'", "no value", "only --fresh"]),
        (["rl", "--optim", "5"], ["--optim: got 'nothing'", "Write --optim.lr VALUE"]),
        (["rl"], ["reward_model: got None", "sequence classifier", "apportion reward"]),
    ],
)
def test_a_wrong_flag_is_named(command: Command, arguments: list[str], pieces: list[str]) -> None:
    command(*arguments).assert_refused_early(*pieces)


@pytest.mark.parametrize(
    ("flag", "value", "pieces"),
    [
        ("steps", "0", ["steps: got 0", "whole number >= 1", "Set it to"]),
        ("steps", "2.5", ["steps: got 2.5", "whole number >= 1"]),
        ("steps", "many", ["steps: got 'many'", "whole number >= 1"]),
        ("steps", "null", ["steps: got None", "whole number >= 1"]),
        ("optim.lr", "-1", ["optim.lr: got -1;", "a number > 0"]),
        ("optim.lr", ".nan", ["optim.lr: got nan", "a number > 0"]),
        ("optim.lr", "nan", ["optim.lr: got 'nan'", "a number > 0"]),
        ("optim.lr", ".inf", ["optim.lr: got inf", "a number > 0"]),
        ("optim.lr", "fast", ["optim.lr: got 'fast'", "a number > 0"]),
        ("sampling.temperature", "0", ["sampling.temperature: got 0;", "a number > 0"]),
        ("loss.clip", "-1", ["ppo.clip: got -1"]),
        ("optim.warmup", "2", ["optim.warmup: got 2;", "[0, 1]"]),
        ("seed", "99999999999", ["seed: got 99999999999", "from 0 to 2^31"]),
        ("ppo.whiten_advantages", "perhaps", ["ppo.whiten_advantages: got 'perhaps'", "true or false, or null"]),
        ("ppo.epochs", "1.5", ["ppo.epochs: got 1.5", "a whole number >= 1, or null"]),
        ("ppo.value_clip", "narrow", ["ppo.value_clip: got 'narrow'", "a number > 0, or null"]),
        (
            "sampling.samples_per_prompt",
            "many",
            ["sampling.samples_per_prompt: got 'many'", "a whole number >= 1, or null"],
        ),
        ("sampling.stop", "never", ["sampling.stop: got 'never'", "length, eos"]),
        ("ppo.truncated", "maybe", ["ppo.truncated: got 'maybe'", "bootstrap"]),
        ("device", "tpu", ["device: got 'tpu'", "auto, cpu, cuda"]),
        ("dtype", "float16", ["dtype: got 'float16'", "bfloat16"]),
        ("sampling.prompt_tokens", "[8, 4]", ["sampling.prompt_tokens: got [8, 4]", "low <= high", "Example: [4, 8]"]),
        ("sampling.samples_per_prompt", "3", ["sampling.batch_size: got 32", "multiple of"]),
        ("lora.targets", "5", ["lora.targets: got 5", '"attention", "all"', "Example: [q_proj"]),
        ("compare", "sparse", ["compare: got 'sparse'", "a list of names"]),
        ("compare", "[sprase]", ["compare: got 'sprase'", "Did you mean 'sparse'"]),
        ("output", "", ["output: got ''", "a name or a path"]),
        ("policy", " ", ["policy: got ' '", "a name or a path"]),
    ],
)
def test_a_wrong_value_is_named(command: Command, flag: str, value: str, pieces: list[str]) -> None:
    done = command("rl", "--reward_model", "x", f"--{flag}", value)
    done.assert_refused_early(*pieces)
    assert list(done.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["--algorithm", "abcd"], ["algorithm: got 'abcd'", "abc, abc-d", "Did you mean 'abc-d'"]),
        (["--credit", "atention"], ["credit: got 'atention'", "sparse", "Did you mean 'attention'"]),
        (["--segments", "token"], ["segments: got 'token'", "Did you mean 'tokens'"]),
        (["--advantages", "gea"], ["advantages: got 'gea'", "Did you mean 'gae'"]),
        (["--credit.mixx", "0.3"], ["credit.prefix_difference: got 'mixx'", "Did you mean 'mix'"]),
        (["--credit", "sparse", "--credit.mix", "0.3"], ["credit.sparse: got 'mix'", "no settings", "Remove mix"]),
        (["--credit.atention.mix", "1"], ["--credit.atention.mix: got 'atention'", "kl_penalty, prefix_difference"]),
        (["--credit", "3"], ["credit: got 3", "a name, {name: {key: value}} or a list", "Example: [attention]"]),
        (["--credit", "[]"], ["credit: got []", "a name"]),
        (["--credit", "{attention: 3}"], ["credit: got {'attention': 3}", "{name: {key: value}}"]),
        (["--segments", "[tokens, tokens]"], ["segments: got ['tokens', 'tokens']", "exactly one method"]),
        (["--credit.mix", "1.5"], ["prefix_difference.mix: got 1.5", "a number in [0, 1]", "0 is sparse"]),
        (["--credit.mix", "-0.1"], ["prefix_difference.mix: got -0.1", "a number in [0, 1]"]),
        (["--credit.mix", ".nan"], ["prefix_difference.mix: got nan", "a number in [0, 1]"]),
        (["--credit.mix", "lots"], ["prefix_difference.mix: got 'lots'", "a number in [0, 1]"]),
        (["--credit.mix", "true"], ["prefix_difference.mix: got True", "a number in [0, 1]"]),
        (["--credit.mix", "{"], ["--credit.mix: got '{'", "YAML", "quote it"]),
        (["--credit.kl_penalty.coef", "-1"], ["kl_penalty.coef: got -1", "a finite number >= 0"]),
        (["--advantages.gamma", "2"], ["gae.gamma: got 2", "a number in [0, 1]"]),
        (
            ["--credit", "[attention, uniform]"],
            ["got 'attention with uniform'", "at most one redistributor", "Choose one"],
        ),
        (["--credit", "[uniform, attention]"], ["got 'uniform with attention'"]),
        (["--credit", "[attention, attention]"], ["credit: got ['attention', 'attention']", "each method once"]),
        (["--credit", "[kl_penalty, attention]"], ["a redistributor at position 1", "Put kl_penalty last"]),
    ],
)
def test_a_wrong_method_is_named(command: Command, arguments: list[str], pieces: list[str]) -> None:
    command("rl", "--reward_model", "x", *arguments).assert_refused_early(*pieces)


def test_discounting_a_redistributed_reward_is_a_warning(command: Command) -> None:
    flags = ("rl", "--reward_model", "x", "--dry_run", "--advantages.gamma", "0.9")
    done = command(*flags)
    done.assert_done()
    assert done.err.startswith("warning: advantages.gae.gamma: got 0.9; expected 1 with a redistributing credit.")
    assert "Use gamma: 1." in done.err and "gamma: 0.9" in done.out and done.loads_nothing
    for others in (["--credit", "sparse"], ["--advantages.gamma", "1.0"]):
        quiet = command(*flags, *others)
        quiet.assert_done()
        assert quiet.err == ""
