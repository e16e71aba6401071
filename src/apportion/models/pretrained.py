"""Reading of model folders and hub ids by transformers: settings, and every error as one message with its fix."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apportion.errors import ModelError
from apportion.models.files import ADAPTER_SETTINGS, is_adapter

FIX = "Check the folder or id, and save it again if it is damaged; a hub id needs the network or a cached copy."
# code in a model's folder is never run; with the default, transformers would ask on the terminal
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
# the package that reads each kind of quantised weights
QUANTISATION_PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "compressed-tensors": "compressed-tensors",
    "fp8": "accelerate",
    "mxfp4": "kernels",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
}


def load_settings(field: str, folder: str) -> Any:
    """Return the configuration of the model in `folder` (or hub id), or of an adapter's base model, without weights.

    Raises:
        ModelError: it cannot be read, or its weights are quantised.
    """
    from transformers import AutoConfig

    _check_base(field, folder)
    try:
        settings = AutoConfig.from_pretrained(base_of(folder), **NO_CODE)
    except Exception as error:  # transformers and the hub's client raise many types, ImportError among them
        expected = "a config.json that transformers can read"
        raise ModelError(field, with_reason(folder, error), expected, fix_of(error)) from error
    _refuse_quantised(field, folder, settings)
    return settings


def _check_base(field: str, folder: str) -> None:
    """Raise ModelError for an adapter whose base model is a path that leads nowhere."""
    try:
        base = base_of(folder)
    except (OSError, ValueError):  # said where it is loaded
        return
    if base == folder or os.path.isdir(base) or (base.count("/") < 2 and not base.startswith(("/", "~", "."))):
        return
    fix = "Write the base model's folder or hub id into base_model_name_or_path of its adapter_config.json."
    raise ModelError(field, f"{folder}, whose base model {base} is not there", "an adapter with its base model", fix)


def named_positions(settings: Any, *names: str) -> int | None:
    """Return the number of positions that `settings` name by one of `names`; None where they name no limit (or −1)."""
    found = (getattr(settings, name, None) for name in names)
    return next((int(one) for one in found if one is not None and int(one) > 0), None)


def _refuse_quantised(field: str, folder: str, settings: Any) -> None:
    """Raise ModelError for quantised weights: they can neither be trained nor saved exactly."""
    both = (getattr(one, "quantization_config", None) for one in (settings, settings.get_text_config()))
    stored = next((one for one in both if one is not None), None)
    if stored is None:
        return
    kind = stored.get("quant_method") if isinstance(stored, Mapping) else getattr(stored, "quant_method", None)
    name = str(getattr(kind, "value", kind) or "an unnamed method")
    package = QUANTISATION_PACKAGES.get(name)
    reader = f"; the package {package} reads it" if package else ""
    fix = "Use the unquantised model that it was made from"
    fix = f"{fix}: name it in the adapter's base_model_name_or_path." if is_adapter(folder) else f"{fix}."
    got = f"{folder}, quantised by {name}{reader}"
    raise ModelError(field, got, "weights in float32, bfloat16 or float16", fix)


def generation_stops(folder: str) -> frozenset[int]:
    """Return the ids at which generation_config.json in `folder` (or hub id) ends a text, or else its config.json.

    Raises:
        ModelError: the file cannot be read, or holds something other than ids.
    """
    from transformers import GenerationConfig, PreTrainedConfig

    file, expected = "generation_config.json", "settings that transformers can read"
    fix = "Fix it, or delete it where the model's config.json names the EOS token."
    base = base_of(folder)
    try:
        given = GenerationConfig.from_pretrained(base, **NO_CODE).eos_token_id
    except OSError:  # a folder without one
        file = "config.json"
        stored, _ = PreTrainedConfig.get_config_dict(base)  # as written: a class's default is no one's choice
        given = stored.get("eos_token_id", (stored.get("text_config") or {}).get("eos_token_id"))
    except Exception as error:  # transformers raises many types here
        raise ModelError(f"{folder}/{file}", reason(error), expected, fix) from error
    ids = [] if given is None else given if isinstance(given, list | tuple) else [given]
    if not all(type(one) is int for one in ids):
        expected = "an id as eos_token_id, or a list of ids"
        raise ModelError(f"{folder}/{file}", given, expected, "Fix it there.")
    return frozenset(ids)


def base_of(folder: str) -> str:
    """Return the base model of the adapter in `folder`, or `folder` itself when it holds a full model.

    Raises:
        ValueError: the adapter names no base model, or another adapter as its base.
    """
    if not is_adapter(folder):
        return folder
    base = adapter_settings(folder).get("base_model_name_or_path")
    if not base:
        raise ValueError("its adapter_config.json names no base model")
    if is_adapter(str(base)):
        raise ValueError(f"its base model {base} is an adapter itself: merge that one first")
    return str(base)


def adapter_settings(folder: str) -> dict[str, Any]:
    """Return the adapter_config.json in `folder`. Raises OSError, or ValueError where it holds no settings."""
    settings = json.loads((Path(folder) / ADAPTER_SETTINGS).read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{ADAPTER_SETTINGS} is no object of settings")
    return settings


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress what transformers and peft print about weights: what is wrong with them is an error of ours."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
            warnings.filterwarnings("ignore", message=".*tied weights")
            yield
    finally:
        logging.set_verbosity(level)


def with_reason(folder: str, error: Exception) -> str:
    """Return the folder with the first line of the library's error."""
    return f"{folder} ({reason(error)})"


def reason(error: Exception) -> str:
    """Return the first line of a library's error, and the next where it announces one; without any its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def fix_of(error: Exception) -> str:
    """Return what to do about a library's error: a missing package is to be installed."""
    if not isinstance(error, ImportError):
        return FIX
    package = f"`pip install {error.name}`" if error.name else "Install the package that it names"
    return f"{package}, or use a model that needs none."
