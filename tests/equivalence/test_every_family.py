"""Every family of the installed transformers, tiny and random: right beside its own class, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_configs import NOT_MADE, families
from family_sweep import built, swept
from huggingface_hub.errors import StrictDataclassError
from tools import family_table

EVERY = [(task, name) for task in family_table.TASKS for name in families(task)]
# of every kind of fault that the sweep found, one that no other test of the usual suite has
SHORT = {
    ("causal", "bart"),  # refused before its weights are read
    ("causal", "inkling2_text"),  # a layer whose name peft's state dict loses
    ("causal", "inkling_text"),  # a module that looks like one that has a fast kernel
    ("causal", "zamba"),  # blocks that share their weights
    ("classifier", "bart"),  # an encoder with a decoder, read at EOS
    ("classifier", "canine"),  # no embedding for each id
    ("classifier", "xlnet"),  # no limit of positions, as −1
}
PAGE = family_table.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("task", family_table.TASKS)
def test_the_page_has_every_family(task: str) -> None:
    """Of the installed transformers: after an update the sweep has to run again."""
    table = family_table.read(PAGE, task)
    assert sorted(table) == families(task), "run `python -m tools.family_table`"
    assert not any("WRONG" in cell for row in table.values() for cell in row)
    untried = {name for name, row in table.items() if row[0].startswith("not tried")}
    assert untried == set(NOT_MADE[task]), "a family that cannot be made tiny is listed with its reason"


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in NOT_MADE.items() for name in names])
def test_what_is_listed_as_not_made_cannot_be(task: str, name: str, tmp_path: Path) -> None:
    with pytest.raises((ImportError, ValueError, AttributeError, TypeError, StrictDataclassError)):
        built(name, task, tmp_path)


@pytest.mark.parametrize(
    ("task", "name"), [pytest.param(*one, marks=() if one in SHORT else pytest.mark.long) for one in EVERY]
)
def test_a_family_is_right_or_refused(task: str, name: str, tmp_path: Path) -> None:
    row = swept(task, name, tmp_path)
    assert row[1:] == family_table.read(PAGE, task)[name], "run `python -m tools.family_table`"
