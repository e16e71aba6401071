"""Methods of the user's, given as package.module:function: one file each, end to end, and their mistakes named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]

MODULE = '''
import torch
from apportion import Credit


def first(*, share: float = 0.5, needs: tuple = ()):
    """Give the first token a share of the reward and the last one the rest."""

    def assign(rollouts, rewards, state):
        total = rewards.sum(dim=1)
        out = torch.zeros_like(rewards)
        out[:, 0] = share * total
        return out + (1 - share) * rewards, state

    return Credit(dict, assign, frozenset(needs), keeps_return=True, causal=False)


def nothing():
    return "not a method"


def lengths(models, rollouts, texts):
    assert len(texts) == len(rollouts)
    return rollouts.mask.sum(dim=1).float()


NUMBER = 3
'''

HALVES = '''
"""Two actions a response: its first half and its second."""
import torch


def halves(*, at: float = 0.5):
    return Halves(at)


class Halves:
    needs = frozenset()

    def __init__(self, at):
        self.at = at

    def __call__(self, rollouts):
        order, count = rollouts.mask.cumsum(dim=1) - 1, rollouts.mask.sum(dim=1, keepdim=True)
        return torch.where(rollouts.mask, (order >= self.at * count).long(), -1)
'''
CENTRED = '''
"""The score minus the mean of the batch, on every token."""
import torch
from apportion import Advantages


def centred(*, scale: float = 1.0):
    return Centred(scale)


class Centred:
    needs = frozenset()

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, rewards, segments, rollouts):
        total = rewards.sum(dim=1, keepdim=True)
        flat = torch.where(rollouts.mask, self.scale * (total - total.mean()), 0.0)
        return Advantages(flat, torch.where(rollouts.mask, total, 0.0))
'''
PLAIN = '''
"""−A·log π, divided by the sequences."""
import torch
from apportion import PolicyLoss


def plain(*, weight: float = 1.0):
    def terms(logprobs, rollouts, advantages, mask, segments):
        assert int(segments.max()) == 1
        return -weight * torch.where(mask, advantages * logprobs, 0.0).sum(), {"mine/tokens": mask.sum().float()}

    return PolicyLoss(terms, lambda mask, segments: mask.any(dim=1).sum(), "token")
'''


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Return a folder with the package `mine`: `good` works, `unimportable` and `wrong` do not import."""
    package = tmp_path / "code" / "mine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "good.py").write_text(MODULE)
    for name, text in (("halves", HALVES), ("centred", CENTRED), ("plain", PLAIN)):
        (package / f"{name}.py").write_text(text)
    (package / "unimportable.py").write_text("import no_such_library\n")
    (package / "wrong.py").write_text("def first(:\n")
    return package.parent


def test_a_credit_of_the_users_trains(model_command: Command, tmp_path: Path, mine: Path, rl_flags: list[str]) -> None:
    spec = "{'mine.good:first': {share: 0.25, needs: ['mine.good:lengths']}}"
    done = model_command("rl", *rl_flags, "--credit", spec, PYTHONPATH=str(mine))
    done.assert_done()
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {1, 2}
    for row in rows:
        landed = [0.25 * row["score"], 0.0, 0.0, 0.75 * row["score"]]
        assert row["credit"] == pytest.approx(landed, abs=1e-5)
    assert "mine.good:first" in (tmp_path / "run" / "config.yaml").read_text()


def test_its_settings_are_flags_too(command: Command, mine: Path) -> None:
    flags = ("rl", "--reward_model", "x", "--credit", "mine.good:first", "--dry_run")
    command(*flags, "--credit.share", 0.1, PYTHONPATH=str(mine)).assert_done()
    wrong = command(*flags, "--credit.shore", 0.1, PYTHONPATH=str(mine))
    wrong.assert_refused_early("credit.mine.good:first: got 'shore'", "Did you mean 'share'")


def test_unknown_evidence_lists_what_there_is(command: Command, mine: Path) -> None:
    spec = "{'mine.good:first': {needs: [reward_atention]}}"
    done = command("rl", "--reward_model", "x", "--credit", spec, PYTHONPATH=str(mine))
    known = ("policy_attention_mean", "reference_logprobs", "reward_attention", "values")
    done.assert_refused_early("evidence: got 'reward_atention'", *known, "Did you mean 'reward_attention'")


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("mine.unimportable:first", ["mine.unimportable:first'", "No module named 'no_such_library'"]),
        ("mine.wrong:first", ["mine.wrong:first'", "SyntaxError", "wrong.py, line 1"]),
        ("mine.absent:first", ["mine.absent:first'", "No module named 'mine.absent'"]),
        ("mine.good:frist", ["mine.good:frist'", "has no attribute 'frist'"]),
        ("mine.good:NUMBER", ["mine.good:NUMBER'", "NUMBER is a int, not a function"]),
        ("mine.good:nothing", ["mine.good:nothing, which returned a str", "a Credit"]),
        ("mine.good:lengths", ["credit.mine.good:lengths: got {}", "a value for 'models'"]),
        (":", ["credit: got ':'", "package.module:function"]),
    ],
)
def test_a_mistake_in_it_is_named(command: Command, mine: Path, name: str, pieces: list[str]) -> None:
    done = command("rl", "--reward_model", "x", "--credit", name, PYTHONPATH=str(mine))
    done.assert_refused_early("credit", *pieces)


def test_a_segmenter_or_estimator_that_is_none_is_named(command: Command, mine: Path) -> None:
    for kind in ("segments", "advantages"):
        done = command("rl", "--reward_model", "x", f"--{kind}", "mine.good:nothing", PYTHONPATH=str(mine))
        done.assert_refused_early(
            f"{kind}: got 'mine.good:nothing, which returned a str'", f"a method for {kind}", "`needs`"
        )


def test_a_segmenter_an_estimator_and_a_loss_are_one_file_each(
    model_command: Command, tmp_path: Path, mine: Path, rl_flags: list[str]
) -> None:
    chosen = ("--segments", "mine.halves:halves", "--segments.at", 0.25, "--advantages", "mine.centred:centred")
    more = ("--advantages.scale", 2.0, "--loss", "mine.plain:plain", "--loss.weight", 0.5)
    model_command("rl", *rl_flags, *chosen, *more, PYTHONPATH=str(mine)).assert_done()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["segments/actions"] for row in rows] == [2.0, 2.0]
    assert all("loss/value" not in row and row["mine/tokens"] == 1.0 for row in rows)  # a token each, over the tokens
    resolved = (tmp_path / "run" / "config.yaml").read_text()
    assert all(name in resolved for name in ("mine.halves:halves", "mine.centred:centred", "mine.plain:plain"))


def test_ids_that_a_segmenter_got_wrong_are_named(
    model_command: Command, tmp_path: Path, mine: Path, rl_flags: list[str]
) -> None:
    wrong = HALVES.replace("(order >= self.at * count).long()", "1 - (order >= self.at * count).long()")
    (mine / "mine" / "falling.py").write_text(wrong)
    done = model_command("rl", *rl_flags, "--segments", "mine.falling:halves", PYTHONPATH=str(mine))
    done.assert_refused("segments of rollout 0, token 0", "0 on the row's first token")


def test_a_loss_that_is_none_is_named(command: Command, mine: Path) -> None:
    done = command("rl", "--reward_model", "x", "--loss", "mine.good:nothing", PYTHONPATH=str(mine))
    done.assert_refused_early("loss: got 'mine.good:nothing, which returned a str'", "PolicyLoss")
