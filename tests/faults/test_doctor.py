"""`apportion doctor`: the cores a run would use; which clause of the contract a credit breaks, on a small batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apportion import credit
from apportion.testing import CLAUSES, violations

Command = Callable[..., Any]
HEAD = """
import torch
from apportion import Credit

def mean(r, x):
    return torch.where(r.mask, x, 0).mean(1, True)

def make(assign, *, keeps=True, causal=False, share=None, needs=(), init=dict, stats=None):
    return Credit(init, assign, frozenset(needs), keeps_return=keeps, causal=causal, share=share, stats=stats)
"""
BROKEN = {
    "shape": ("make(lambda r, x, s: (x.sum(dim=1), s))", "shape kept"),
    "dtype": ("make(lambda r, x, s: (x.float(), s))", "dtype kept"),
    "leaks": ("make(lambda r, x, s: (x + 0.5 - 0.5 * r.mask.to(x), s), keeps=False)", "zeros off the mask"),
    "product": ("make(lambda r, x, s: (x * r.mask, s))", "finite"),
    "mutates": (
        "make(lambda r, x, s: (x.mul_(1.0), r.evidence['v'].zero_(), (x, s))[2], needs=('v',))",
        "inputs not changed",
    ),
    "moves": (
        "make(lambda r, x, s: (torch.where(r.mask, x, 0), {'n': s['n'] + 1}), init=lambda: {'n': torch.zeros(())})",
        "state moved by `update` only",
    ),
    "width": (
        "make(lambda r, x, s: (torch.where(r.mask, x / x.shape[1], 0), s), keeps=False)",
        "padding does not matter",
    ),
    "batch": (
        "make(lambda r, x, s: (torch.where(r.mask, x - torch.where(r.mask, x, 0).mean(), 0), s), keeps=False)",
        "rows do not depend on one another",
    ),
    "loses": ("make(lambda r, x, s: (torch.where(r.mask, 0.5 * x, 0), s))", "keeps_return as declared"),
    "looks": (
        "make(lambda r, x, s: (torch.where(r.mask, mean(r, x), 0).to(x), s), keeps=False, causal=True)",
        "causal as declared",
    ),
    "foresees": (
        "make(lambda r, x, s: (torch.where(r.mask, x + r.scores[:, None], 0).to(x), s), keeps=False, causal=True)",
        "causal as declared",
    ),
    "share": ("make(lambda r, x, s: (torch.where(r.mask, x, 0), s), share=lambda r: 0.3 * r.mask)", "shares sum to 1"),
    "stats": (
        "make(lambda r, x, s: (torch.where(r.mask, x, 0), s), stats=lambda r, b, a: {'m': (b.sum() / 0, b.sum())})",
        "statistics are finite and add up",
    ),
    "raises": ("make(lambda r, x, s: 1 / 0)", "shape kept"),
}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    made = "".join(f"\ndef {name}():\n    return {text}\n" for name, (text, _) in BROKEN.items())
    good = "\ndef good(*, mix=0.5):\n    return make(lambda r, x, s: (torch.where(r.mask, x, 0), s), causal=True)\n"
    (tmp_path / "mine.py").write_text(HEAD + made + good)
    return tmp_path


@pytest.mark.parametrize("name", BROKEN)
def test_the_broken_clause_is_named_with_the_smallest_batch(command: Command, mine: Path, name: str) -> None:
    done = command("doctor", "--credit", f"mine:{name}", PYTHONPATH=str(mine))
    assert done.code == 2 and "Traceback" not in done.err, done.err
    clause = BROKEN[name][1]
    assert f"\n{clause}: " in done.out and "The smallest batch that shows it:" in done.out
    row = next(line for line in done.out.splitlines() if line.startswith("│") and clause in line)
    assert "FAIL" in row
    case = done.out[done.out.index(f"\n{clause}: ") :]
    mask = eval(case[case.index("mask    = ") + 10 :].split("\n")[0])
    assert sum(map(len, mask)) <= 6, "not a small batch"


def test_a_credit_that_keeps_the_contract_passes(command: Command, mine: Path) -> None:
    done = command("doctor", "--credit", "mine:good", "--credit.mix", "0.2", PYTHONPATH=str(mine))
    done.assert_done()
    assert "FAIL" not in done.out and all(clause in done.out for clause in CLAUSES)


BUILT_IN = sorted(set(credit.METHODS) - {"implicit", "process"})


# tests/contract/test_credit_contract.py has every clause for each of them, on other batches
@pytest.mark.parametrize(
    "name", [name if name == "attention" else pytest.param(name, marks=pytest.mark.long) for name in BUILT_IN]
)
def test_every_built_in_credit_passes(name: str) -> None:
    assert violations(credit.find(name)()) == []


def test_without_arguments_it_shows_the_cores(command: Command) -> None:
    done = command("doctor", OMP_NUM_THREADS="1")
    done.assert_done()
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in done.out.splitlines() if "│" in line}
    assert set(rows) == {"cores", "load", "threads", "waiting", "memory"}
    assert rows["threads"] == "1 (OMP_NUM_THREADS)"
    assert f"of {os.cpu_count()} processors" in rows["cores"]


def test_mistakes_are_named(command: Command, mine: Path) -> None:
    command("doctor", "--credit", "").assert_refused("--credit: got", "package.module:function")
    command("doctor", "--credit", "atention").assert_refused("credit: got 'atention'", "Did you mean 'attention'")
    done = command("doctor", "--credit", "mine:good", "--credit.mixx", "1", PYTHONPATH=str(mine))
    done.assert_refused("credit.mine:good: got 'mixx'", "Did you mean 'mix'")
