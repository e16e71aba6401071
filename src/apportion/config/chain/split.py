"""Settings of `apportion split`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from apportion.config.schema.rules import Count, CountOrZero, Name, Seed, Switch, listed
from apportion.config.schema.section import Rule, Section

Sources = Annotated[
    list[Name],
    BeforeValidator(listed),
    Field(min_length=1),
    Rule(
        "a file, folder or hub id of rankings or preference pairs, or a list of these",
        "Example: --data '[rankings.jsonl, pairs.jsonl]'.",
    ),
]


class SplitConfig(Section):
    """`apportion split`: people's rankings split by prompt, so that no prompt of the evaluation was trained on.

    It writes rankings.jsonl, demonstrations.jsonl (the best answers) and prompts.jsonl to train on, and
    held_out_rankings.jsonl and held_out_prompts.jsonl to evaluate with. Conversations that begin with the same turn
    fall into the same part.
    """

    data: Sources = Field(default_factory=list, validate_default=False)
    """rankings (prompt, completions, ranks) or preference pairs (chosen, rejected), one file or several."""
    split: Name | None = None
    """the split of `data` to read, of a folder or hub set with splits; null for train."""
    output: Name = "runs/split"
    """run folder; the files are in it."""
    held_out: CountOrZero = 128
    """held-out prompts, at least; 0 trains on all."""
    longest_prompt: Count | None = None
    """leave out longer prompts, characters of all their turns; null keeps all."""
    count: Count | None = None
    """prompts to keep in all, chosen by hash; null for all."""
    dialogues: Switch = False
    """read prompts such as "Human: … Assistant: …" as conversations."""
    skip_bad_rows: Switch = False
    """skip unusable rows, count them and write them to bad_rows.jsonl; off, the first of them is an error."""
    seed: Seed = 0
    """random seed; with the text of a prompt it decides the part."""
