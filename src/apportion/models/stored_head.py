"""The head of a reward model: where it is, how many scores it gives, and which label's is the good one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from apportion.errors import ConfigError, ModelError
from apportion.models.families import bare
from apportion.models.files import stored_shapes
from apportion.models.pretrained import adapter_settings

HEADS = ("score", "classifier")  # names of the module that gives the logits, in the classifiers of transformers
WEIGHTS = (  # and of its last layer's weights in their files
    "score.weight",
    "classifier.weight",
    "classifier.out_proj.weight",
    "classification_head.out_proj.weight",
    "logits_proj.weight",
)
GOOD = frozenset({
    "accepted", "acceptable", "approved", "better", "chosen", "correct", "good", "great", "harmless", "helpful", "like",
    "liked", "pass", "passed", "pos", "positive", "preferred", "right", "true", "yes",
})  # fmt: skip
GENERIC = re.compile(r"(?:label|class)?[ _-]?([01])")  # LABEL_0 and LABEL_1, the names of a model that has none
CONVENTION = (
    "its labels have no names ({names}): the score is the logit of {positive} minus the other's, as binary classifiers "
    "count. Pass --positive_label where the good one is the other"
)


def label_count(field: str, folder: str, base: str, settings: Any, *, download: bool = True) -> int:
    """Return the number of rows of the stored head of the classifier in `folder`, 1 or 2.

    Args:
        base: the model under an adapter, or `folder` itself.
        download: whether to fetch the weights of a hub id; one that is not here counts by its settings otherwise.
        settings: the configuration of `base`, whose own number of labels need not be that of the head.

    Raises:
        ModelError: another number, a classifier of tokens, or one whose labels do not exclude each other.
    """
    kinds = [str(kind) for kind in getattr(settings, "architectures", None) or []]
    if stored_task(folder) == "TOKEN_CLS" or (base == folder and any("ForTokenClassification" in k for k in kinds)):
        fix = "Use a sequence classifier: one score for a whole text."
        raise ModelError(field, f"{folder}, a classifier of tokens", "a sequence classifier", fix)
    stored = stored_rows(folder, download)
    stored = stored_rows(base, download) if stored is None and base != folder else stored
    count = int(settings.num_labels) if stored is None else stored
    if count not in (1, 2):
        fix = "Use a reward model (1 label) or a binary classifier (2 labels)."
        raise ModelError(field, f"{folder} with {count} labels", "1 or 2 labels", fix)
    if count == 2 and getattr(settings, "problem_type", None) == "multi_label_classification":
        fix = "Its labels do not exclude each other, so that their difference is no score: use a model with one label."
        raise ModelError(field, f"{folder}, a multi-label classifier", "1 label, or 2 that exclude each other", fix)
    return count


def stored_rows(folder: str, download: bool = True) -> int | None:
    """Return the number of rows of the head in the weights of `folder` (or hub id); None without one.

    A file that cannot be read is an error where it is loaded.
    """
    from safetensors import SafetensorError

    try:
        heads = stored_shapes(folder, lambda name: head_name(name) in WEIGHTS, download=download)
        return next((shape[0] for shape in heads.values()), None)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError):
        return None


def head_of(model: Any) -> nn.Module | None:
    """Return the module named as classifiers name their head, or None."""
    return next((module for name, module in bare(model).named_children() if name in HEADS), None)


def head_name(key: str) -> str:
    """Return the name of a stored weight without what an adapter's file puts around it."""
    return key.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".modules_to_save", "")


def stored_task(folder: str) -> str:
    """Return the task that an adapter in `folder` was trained for, such as SEQ_CLS; "" where none is named."""
    try:
        return str(adapter_settings(folder).get("task_type") or "")
    except (OSError, ValueError):
        return ""


def positive_label(
    field: str, names: Mapping[Any, Any] | None, count: int, wanted: str | None = None
) -> tuple[int, str | None]:
    """Return (index of the good label of a head of `count` rows, a note where that is a convention, else None).

    Args:
        names: {index: label} of the configuration.
        wanted: the setting `positive_label`, a label's name or number.

    Raises:
        ConfigError: `wanted` is no label of this model, or it has no labels to choose from.
        ModelError: neither the names nor the setting say which label is the good one.
    """
    labels = [str((names or {}).get(i, f"LABEL_{i}")) for i in range(count)]
    if wanted is not None:
        return _wanted(labels, wanted), None
    if count == 1:
        return 1, None  # not used
    good = [i for i, label in enumerate(labels) if _first_word(label) in GOOD]
    if len(good) == 1:
        return good[0], None
    numbers = [GENERIC.fullmatch(label.strip().lower()) for label in labels]
    if all(numbers) and {found[1] for found in numbers if found} == {"0", "1"}:
        positive = next(i for i, found in enumerate(numbers) if found and found[1] == "1")
        return positive, CONVENTION.format(names=" and ".join(labels), positive=labels[positive])
    fix = f"Say which one is good: --positive_label {labels[1]} or --positive_label {labels[0]}."
    raise ModelError(f"{field}'s labels", " and ".join(map(repr, labels)), "names that say which is good", fix)


def _wanted(labels: list[str], wanted: str) -> int:
    if len(labels) == 1:
        fix = "Leave positive_label out: this model gives one score."
        raise ConfigError("positive_label", wanted, "null, for a model with one label", fix)
    same = [i for i, label in enumerate(labels) if label.strip().lower() == wanted.strip().lower()]
    if len(same) == 1:
        return same[0]
    if wanted.strip() in ("0", "1"):
        return int(wanted)
    expected = f"one of {', '.join(labels)}, or 0 or 1"
    raise ConfigError("positive_label", wanted, expected, "Name the label whose logit raises the score.")


def _first_word(label: str) -> str:
    words = re.findall(r"[a-z]+", label.lower())
    return words[0] if words else ""
