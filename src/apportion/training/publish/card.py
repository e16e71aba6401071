"""The card of a trained model (README.md): how to load it, data, method, results with intervals, limits, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from apportion import __version__
from apportion.models.saving import front_matter
from apportion.system.disk import sync
from apportion.training.publish.sources import Use, files_in, is_hub_set

SCORES = {  # number of labels -> how R is computed
    1: "model(**tokens).logits[0, 0].item()",
    2: "(model(**tokens).logits[0, 1] - model(**tokens).logits[0, 0]).item()",
}
GENERATES = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
tokens = tokenizer("...", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=64)[0]))
"""
CLASSIFIES = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
tokens = tokenizer("...", return_tensors="pt")
print({score})
"""


class Row(NamedTuple):
    """One line of the results: what was measured, and an interval {mean, low, high} or a number."""

    name: str
    value: Mapping[str, float] | float


class Card(NamedTuple):
    """What the card of one stage says.

    Attributes:
        title: of the card. tag: of the kind of training. summary: what the model is, a sentence or two.
        method: how it was trained, in Markdown. data: what it was trained and evaluated on.
        results: measured numbers. measured: on what, in words. limits: one sentence each.
        labels: of a reward model 1 or 2; None for a language model.
    """

    title: str
    tag: str
    summary: str
    method: str
    data: Sequence[Use]
    results: Sequence[Row]
    measured: str
    limits: Sequence[str]
    labels: int | None = None


def write_card(folder: Path, card: Card, base: str, settings: Mapping[str, Any]) -> None:
    """Write `card` to README.md of a saved model.

    Args:
        base: the model that training started from, as the settings name it. settings: every setting of the run.
    """
    path = folder / "README.md"
    path.write_text(text_of(card, base, settings), encoding="utf-8")
    sync(path)


def text_of(card: Card, base: str, settings: Mapping[str, Any]) -> str:
    """Return the card as text, with its front matter."""
    place, licence = settings.get("push_to_hub") or "path/to/final", settings.get("license")
    hub_sets = dict.fromkeys(use.source for use in card.data if is_hub_set(use.source))
    task = "text-generation" if card.labels is None else "text-classification"
    loading = GENERATES if card.labels is None else CLASSIFIES.replace("{score}", SCORES[card.labels])
    dumped = yaml.safe_dump(without_folders(dict(settings)), sort_keys=False, allow_unicode=True)
    given = f"The licence given for this model is {licence}. " if licence else "No licence was given for this model. "
    parts = [
        front_matter(base, card.tag, task=task, datasets=list(hub_sets), licence=licence) + f"\n# {card.title}",
        card.summary,
        f"## How to load it\n\n```python\n{loading.format(place=place)}```",
        f"## Method\n\n{card.method}\n\nIt started from `{without_folders(base)}`.",
        f"## Data\n\n{data_table(card.data)}\n\nThe licences of the data are unknown here: ask their source.",
        f"## Results\n\n{results_table(card.results)}\n\n{card.measured}",
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in card.limits),
        f"## Licence\n\n{given}Those of its base model and of its data apply as well.",
        f"## Settings\n\nTrained by apportion {__version__} with:\n\n```yaml\n{dumped}```\n",
    ]
    return "\n\n".join(parts)


def data_table(uses: Sequence[Use]) -> str:
    """Return a table of the data: role, amount, file, size, SHA-256."""
    lines = ["| for | amount | file | bytes | SHA-256 |", "|---|---|---|---|---|"]
    for use in uses:
        for file in files_in(use.source, use.split):
            size, digest = "" if file.size is None else f"{file.size}", f"`{file.sha256}`" if file.sha256 else ""
            split = f", split {use.split}" if use.split else ""
            lines.append(f"| {use.role} | {use.amount} | {_cell(file.name)}{split} | {size} | {digest} |")
    return "\n".join(lines)


def results_table(rows: Sequence[Row]) -> str:
    """Return a table of the results, or that there are none."""
    if not rows:
        return "Nothing was held out, so nothing was measured."
    lines = ["| measure | mean | 95% interval |", "|---|---|---|"]
    for name, value in rows:
        if isinstance(value, Mapping):
            lines.append(f"| {name} | {value['mean']:.4g} | {value['low']:.4g} to {value['high']:.4g} |")
        else:
            lines.append(f"| {name} | {value:.4g} | |")
    return "\n".join(lines)


def rows_of(evaluation: Mapping[str, Any], names: Mapping[str, str]) -> list[Row]:
    """Return the rows of the measures that an evaluation has, by `names` {key: words}."""
    return [Row(words, evaluation[key]) for key, words in names.items() if key in evaluation]


def without_folders(value: Any) -> Any:
    """Return settings whose absolute paths are their last part only: a card may be read by anybody."""
    if isinstance(value, Mapping):
        return {without_folders(name): without_folders(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(one) for one in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return "/".join(("…", *Path(value).parts[-2:])) if Path(value).name == "final" else f"…/{Path(value).name}"
    return value


def _cell(text: str) -> str:
    """Return text that cannot end a table's cell, nor be markup."""
    return "`" + " ".join(text.replace("|", "/").replace("`", "'").split()) + "`"
