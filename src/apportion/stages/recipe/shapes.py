"""Sizes of the models that a recipe's stages compute with, without their weights being loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from apportion.config.chain.resolve import Stage
from apportion.data.assets import BUILTIN_MODELS, builtin_model, missing_megabytes
from apportion.models.pretrained import load_settings
from apportion.stages.doctor.checks import footprint
from apportion.stages.recipe.inputs import Input

START = ("model", "policy", "start", "policies")  # the settings that name the model which a stage starts from


class Size(NamedTuple):
    """A model's size: its shape, weights of the blocks, and weights of the output layer."""

    shape: footprint.Shape
    blocks: int
    head: int


def bases(stages: Sequence[Stage], inputs: Mapping[str, Sequence[Input]]) -> dict[str, str]:
    """Return {stage: the model that its weights began as}, followed back through the stages before it."""
    found: dict[str, str] = {}
    for stage in stages:
        first = next((one for setting in START for one in inputs[stage.name] if one.setting == setting), None)
        if first is not None:
            found[stage.name] = found.get(first.stage, "") if first.source == "stage" else first.name
    return found


def size_of(name: str) -> Size | None:
    """Return the size of a built-in model or a folder, read from its files' headers; None where they are not here."""
    if name in BUILTIN_MODELS:
        if missing_megabytes(name):
            return None
        name = str(builtin_model(name))
    folder = str(Path(name).expanduser())
    weights = footprint.stored_weights(folder) if name else None
    if weights is None:
        return None
    shape = footprint.shape_of(load_settings("model", folder), weights)
    head = shape.vocabulary * shape.hidden
    return Size(shape, max(1, weights - head), head)
