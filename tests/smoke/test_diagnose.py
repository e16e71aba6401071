"""`apportion diagnose` on tiny real models: its gradients against autograd, its figures, its table, page and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

from apportion.cli.main import main
from apportion.report.page import write_report
from apportion.stages.diagnose.diagnose import projected, score_functions, verdict

FIGURES = ("cosine", "bias", "snr", "useful_snr")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


def flags(world: Path, output: Path, *more: str) -> list[str]:
    models = ["--policy", str(world / "ending"), "--reward_model", str(world / "reward")]
    size = ["--count", "6", "--samples", "4", "--sampling.batch_size", "8", "--sampling.max_new_tokens", "6"]
    rest = ["--prompts", str(world / "prompts.jsonl"), "--output", str(output), "--dtype", "float32", "--device", "cpu"]
    return ["diagnose", *models, *size, *rest, "--sampling.stop", "eos", *more]


@pytest.fixture(scope="module")
def found(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the run folder and what stands in its diagnosis.json."""
    output = tmp_path_factory.mktemp("found") / "run"
    methods = "[sparse, uniform, attention, prefix_difference, {attention: {mix: 0.0}}, ma-ppo, abc-grpo]"
    assert main(flags(world, output, "--methods", methods)) == 0
    return output, json.loads((output / "diagnosis.json").read_text())


def test_score_functions_are_the_gradient_by_a_map_on_the_last_states(world: Path) -> None:
    """Σ_t A_t·v_t h_tᵀ equals autograd's gradient of Σ_t A_t·log π by a matrix M, h → h + M h, at M = 0."""
    policy = tiny_runs.policy(world, **{"sampling.stop": "eos", "sampling.temperature": 0.7})
    batch = tiny_runs.sampled(policy, tiny_runs.prompts(4), stop="eos", max_new_tokens=7)
    weights = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0))
    left, right, stop = score_functions(policy, batch, 768)
    mine = torch.einsum("bt,btd,bte->de", weights, left, right)
    size = left.shape[-1]
    bend, push = torch.zeros(size, size, requires_grad=True), torch.zeros(400, requires_grad=True)
    policy.plain = False  # so that the model's own logits are read, and with them the hooks'
    head = policy.model.get_output_embeddings()
    hooks = [
        head.register_forward_pre_hook(lambda module, args: (args[0] + args[0] @ bend.T,)),
        head.register_forward_hook(lambda module, args, out: out + push),
    ]
    try:
        logprobs = policy.forward(batch, values=False).logprobs
    finally:
        for hook in hooks:
            hook.remove()
    by_map, by_logits = torch.autograd.grad((weights * logprobs).sum(), [bend, push])
    torch.testing.assert_close(mine, by_map, rtol=1e-4, atol=1e-5)
    assert stop is not None
    eos = float((weights * stop).sum()) / policy.temperature
    assert eos == pytest.approx(float(by_logits[tiny_runs.EOS]), rel=1e-4, abs=1e-5)


def test_projected_states_keep_inner_products_in_expectation() -> None:
    states = torch.randn(2, 3, 4000, generator=torch.Generator().manual_seed(0))
    small = projected(states, 1000, 0)
    assert small.shape == (2, 3, 1000)
    before, after = (x.flatten(0, 1) @ x.flatten(0, 1).T for x in (states, small))
    assert (before - after).abs().max() < 0.25 * before.diagonal().mean()
    assert projected(states, 4000, 0) is states


def test_every_figure_is_there_with_its_expected_value(found: tuple[Path, dict[str, Any]]) -> None:
    reported = found[1]
    assert reported["rollouts"] == 24 and reported["prompts"] == 6 and reported["samples"] == 4
    methods = reported["methods"]
    assert set(methods) == {
        "sparse", "uniform", "attention", "prefix_difference", "attention(mix=0.0)", "ma-ppo", "abc-grpo",
    }  # fmt: skip
    for name, measured in methods.items():
        for key in (*FIGURES, "stop", "stop_bias"):
            value = measured[key]
            if name == "abc-grpo" and key in ("bias", "stop_bias"):  # divided by the group's standard deviation
                assert value is None
                continue
            assert set(value) == {"mean", "low", "high"}
            assert value["mean"] is None or value["low"] <= value["high"], (name, key)
        assert measured["verdict"].startswith("its expected gradient ")
        assert measured["extra_forwards"] == 0  # all of these ride on the passes that are run anyway
    # β = 0 is sparse, whatever it is called
    for key in FIGURES:
        assert methods["attention(mix=0.0)"][key] == methods["sparse"][key]
    assert methods["attention"]["credit/kept_mass"] > 0
    assert reported["recommended"] is None or reported["recommended"] in methods
    assert "prompts" in reported["why"] or "signal" in reported["why"]


def test_a_finished_diagnosis_is_reused_and_printed_as_one_object(
    world: Path, found: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, reported = found
    methods = "[sparse, uniform, attention, prefix_difference, {attention: {mix: 0.0}}, ma-ppo, abc-grpo]"
    before = (folder / "diagnosis.json").stat().st_mtime_ns
    assert main(flags(world, folder, "--methods", methods, "--json")) == 0
    assert json.loads(capsys.readouterr().out) == reported
    assert (folder / "diagnosis.json").stat().st_mtime_ns == before


def test_a_finished_diagnosis_is_not_passed_off_as_one_of_other_settings(
    world: Path, found: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, reported = found
    settings = (folder / "config.yaml").read_text()
    assert main(flags(world, folder, "--methods", "[sparse, uniform]")) == 2
    message = capsys.readouterr().err
    assert "output: got" in message and "methods" in message and "--fresh" in message
    assert json.loads((folder / "diagnosis.json").read_text()) == reported
    assert (folder / "config.yaml").read_text() == settings


def test_the_table_and_the_page_name_every_method(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(world, tmp_path / "run", "--methods", "[sparse, uniform]")) == 0
    out = capsys.readouterr().out
    assert "sparse" in out and "uniform" in out and "95% intervals" in out
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert "Direction of each credit method's gradient" in page and "its expected gradient" in page
    assert "No evaluation yet" not in page


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["--methods", "[sparze]"], ["methods: got 'sparze'", "Did you mean 'sparse'"]),
        (["--methods", "[{attention: {mix: 2}}]"], ["attention.mix: got 2"]),
        (["--methods", "[{grpo: {std: false}}]"], ["methods.grpo: got 'std'", "no settings"]),
        (["--methods", "[]"], ["methods: got []", "at least one"]),
        (["--samples", "1"], ["samples: got 1", "whole number >= 2"]),
        (["--count", "1"], ["count: got 1", "a whole number >= 2"]),
        (["--lam", "1.5"], ["lam: got 1.5", "[0, 1]"]),
        (["--sampling.samples_per_prompt", "4"], ["sampling.samples_per_prompt: got 4", "Use --samples"]),
        (["--methods", "[implicit]"], ["implicit.model"]),
    ],
)
def test_mistakes_are_named(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], pieces: list[str]
) -> None:
    assert main(flags(world, tmp_path / "run", *arguments)) == 2
    message = capsys.readouterr().err
    for piece in pieces:
        assert piece in message, message
    assert not (tmp_path / "run").exists()


def test_the_verdict_names_what_a_stop_bias_rewards() -> None:
    wide = {"mean": 0.9, "low": 0.8, "high": 0.97}
    bias = {"mean": -0.2, "low": -0.3, "high": -0.1}
    assert "rewards longer responses" in verdict({"cosine": wide, "stop_bias": bias})
    bias = {"mean": 0.2, "low": 0.1, "high": 0.3}
    assert "rewards stopping early" in verdict({"cosine": wide, "stop_bias": bias})
    bias = {"mean": 0.0, "low": -0.1, "high": 0.1}
    assert "rewards" not in verdict({"cosine": wide, "stop_bias": bias})
