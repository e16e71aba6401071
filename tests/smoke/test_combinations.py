"""Every credit × segments × estimator × loss: what means nothing is refused by name, everything else runs.

The rules are written here once more, from what the methods are, and not read from the table that is tested. The whole
product runs two steps with APPORTION_LONG=1; otherwise a seeded sample that holds every pair of methods runs one.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_runs
from examples import LONG

from apportion import advantages, algorithms, credit, losses, segments
from apportion.errors import ConfigError
from apportion.stages.method import build_method
from apportion.stages.rl.train import train


class Choice(NamedTuple):
    """One option of a field: its spec, and what of its nature the rules ask for."""

    label: str
    spec: Any
    nature: frozenset[str] = frozenset()


def nature(*words: str) -> frozenset[str]:
    return frozenset(words)


def credits(folder: Path) -> list[Choice]:
    dense, shares = nature("dense"), nature("dense", "shares")
    found = {
        "sparse": Choice("sparse", "sparse"),
        "uniform": Choice("uniform", "uniform", shares),
        "attention": Choice("attention", "attention", shares),
        "policy_attention": Choice("policy_attention", "policy_attention", shares),
        "prefix_difference": Choice("prefix_difference", "prefix_difference", dense),
        "prefix_difference(omit)": Choice("prefix_difference(omit)", {"prefix_difference": {"initial": "omit"}}, dense),
        "attribution": Choice("attribution", "attribution", dense),
        "shapley": Choice("shapley", {"shapley": {"budget": 8}}, dense),
        "implicit": Choice("implicit", {"implicit": {"model": str(folder / "ending")}}),
        "process": Choice("process", {"process": {"function": "reward_functions:per_token"}}),
        "length_penalty": Choice("length_penalty", "length_penalty"),
        "kl_penalty": Choice("kl_penalty", ["sparse", "kl_penalty"], nature("kl")),
    }
    assert {name.split("(")[0] for name in found} == set(credit.METHODS), "a credit without a line here"
    return list(found.values())


def others() -> tuple[list[Choice], list[Choice], list[Choice]]:
    parts = [Choice(name, name) for name in segments.METHODS if name != "parsed"]
    scalar, whole = nature("scalar"), nature("scalar", "weighs")
    estimators = [
        Choice("gae", "gae"),
        Choice("monte_carlo", "monte_carlo"),
        Choice("reinforce_pp", "reinforce_pp"),
        Choice("reinforce_pp(group)", {"reinforce_pp": {"baseline": "group"}}),
        Choice("vine", {"vine": {"samples": 1}}, nature("vine")),
        Choice("group_relative", "group_relative", scalar),
        Choice("leave_one_out", "leave_one_out", scalar),
        Choice("group_relative(mix)", {"group_relative": {"credit_mix": 0.5}}, whole),
        Choice("leave_one_out(mix)", {"leave_one_out": {"credit_mix": 0.5}}, whole),
    ]
    assert {c.label.split("(")[0] for c in estimators} == set(advantages.METHODS)
    policy_losses = [
        Choice("ppo", "ppo"),
        Choice("ppo(action)", {"ppo": {"ratio": "action"}}, nature("action")),
        Choice("grpo", "grpo"),
        Choice("grpo(kl)", {"grpo": {"kl_coef": 0.04}}, nature("pays kl")),
        Choice("dr_grpo", {"dr_grpo": {"length": 5}}),
        Choice("dapo", "dapo"),
        Choice("gspo", "gspo", nature("sequence")),
        Choice("gspo(token)", {"gspo": {"token": True}}),
        Choice("cispo", "cispo"),
        Choice("reinforce", "reinforce"),
    ]
    assert {c.label.split("(")[0] for c in policy_losses} == set(losses.METHODS)
    return parts, estimators, policy_losses


def meaningless(one: Choice, parts: Choice, estimator: Choice, loss: Choice) -> str | None:
    """Return the field whose choice is refused, or None for a combination that means something."""
    dense, weighs, scalar = "dense" in one.nature, "weighs" in estimator.nature, "scalar" in estimator.nature
    if dense and scalar and not weighs:
        return "credit"
    if weighs and "shares" not in one.nature:
        return "advantages"
    if "sequence" in loss.nature and (weighs or not (scalar or parts.label == "whole_response")):
        return "loss"
    if "action" in loss.nature and weighs:
        return "loss"
    if "vine" in estimator.nature and one.label not in ("sparse", "kl_penalty"):
        return "credit"
    return "loss" if "pays kl" in loss.nature and "kl" in one.nature else None


def chosen(folder: Path) -> list[tuple[Choice, Choice, Choice, Choice]]:
    """Return the whole product, or a sample in which every pair of options of two fields stands."""
    fields = (credits(folder), *others())
    every = list(itertools.product(*fields))
    if LONG:
        return every
    random.Random(0).shuffle(every)
    seen: set[tuple[str, str]] = set()
    sample = []
    for least in (4, 2, 1):  # those that bring most new pairs first, so that few are enough
        for combination in every:
            placed = [f"{field}{choice.label}" for field, choice in enumerate(combination)]
            pairs = set(itertools.combinations(placed, 2))
            if len(pairs - seen) >= least:
                sample.append(combination)
                seen |= pairs
    return sample


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", [choice.label for choice in credits(Path("unused"))])
def test_every_combination_is_refused_or_runs(world: Path, tmp_path: Path, name: str) -> None:
    ran = refused = 0
    mine = [combination for combination in chosen(world) if combination[0].label == name]
    for number, (one, parts, estimator, loss) in enumerate(mine):
        config = tiny_runs.config(world, tmp_path / str(number), **{"sampling.stop": "eos", "policy": world / "ending"})
        chain = one.spec if isinstance(one.spec, list) else [one.spec]
        config.credit, config.segments, config.advantages, config.loss = chain, parts.spec, estimator.spec, loss.spec
        config.sampling.batch_size, config.log_rollouts, config.compare = 4, 2, []
        config.steps = 2 if LONG else 1
        label = f"{one.label} × {parts.label} × {estimator.label} × {loss.label}"
        field = meaningless(one, parts, estimator, loss)
        if field is None:
            run = train(config)
            assert run.finished, label
            rows = tiny_runs.read_lines(run.path / "metrics.jsonl")
            assert [row["step"] for row in rows] == [1, 2][: config.steps] and all(
                row["loss/policy"] == row["loss/policy"] for row in rows
            )
            assert ("loss/value" in rows[0]) == (estimator.label == "gae"), label
            ran += 1
            continue
        with pytest.raises(ConfigError) as caught:
            build_method(config)
        assert str(caught.value).startswith(f"{field}: got '"), (label, str(caught.value))
        assert not (tmp_path / str(number)).exists()
        refused += 1
    assert ran + refused == len(mine) and ran > 1 and refused > 0


GROUPS = {
    "sampling.batch_size": 8,
    "credit": [{"prefix_difference": {"initial": "omit"}}],
    "advantages": "leave_one_out",
}
VINE = {"algorithm": "vineppo", "ppo.truncated": "mask", "sampling.stop": "eos"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (GROUPS, "credit: got 'prefix_difference with leave_one_out'"),
        (VINE | {"credit": ["sparse", "length_penalty"]}, "credit: got 'length_penalty with vine'"),
        (VINE | {"credit": ["sparse", {"implicit": {"model": "a"}}]}, "credit: got 'implicit with vine'"),
        (VINE | {"ppo.truncated": "penalty"}, "ppo.truncated: got 'penalty'"),
        (VINE | {"ppo.whiten_rewards": True}, "ppo.whiten_rewards: got True"),
        ({"ppo.truncated": "mask"}, "ppo.truncated: got 'mask'; expected terminal: with"),
        ({"ppo.truncated": "bootstrap"}, "ppo.truncated: got 'bootstrap'; expected terminal: with"),
        ({"ppo.truncated": "penalty"}, "ppo.truncated: got 'penalty'; expected terminal: with"),
        (
            {"ppo.truncated": "bootstrap", "sampling.stop": "eos", "credit": "prefix_difference"},
            "ppo.truncated: got 'bootstrap'; expected terminal, mask or penalty with prefix_difference",
        ),
        ({"credit": []}, "credit: got []"),
        ({"segments": {}}, "segments: got {}"),
    ],
)
def test_settings_that_take_the_meaning_away_are_refused(world: Path, changes: dict[str, Any], message: str) -> None:
    config = tiny_runs.config(world)
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        setattr(getattr(config, section) if section else config, field, value)
    with pytest.raises(ConfigError) as caught:
        build_method(config)
    assert str(caught.value).startswith(message), str(caught.value)


def test_plain_gspo_takes_any_estimator_of_one_action_a_response() -> None:
    for estimator in ("gae", "monte_carlo", "reinforce_pp", "vine"):
        algorithms.build("bandit", advantages_spec=estimator, loss_spec="gspo")
        with pytest.raises(ConfigError, match=r"loss: got 'gspo with the token-wise advantages"):
            algorithms.build("bandit", advantages_spec=estimator, loss_spec="gspo", segments_spec="tokens")


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_every_named_algorithm_runs(world: Path, tmp_path: Path, name: str) -> None:
    changes: dict[str, Any] = {"sampling.batch_size": 8, "algorithm": name}
    if name == "rto":
        changes["credit.implicit.model"] = str(world / "ending")
    if name == "dr-grpo":
        changes["loss.length"] = 5
    run = train(tiny_runs.config(world, tmp_path / "run", **changes))
    rows = tiny_runs.read_lines(run.path / "metrics.jsonl")
    assert len(rows) == 2 and all(row["policy/grad_norm"] > 0 for row in rows)
