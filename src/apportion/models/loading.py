"""Loading of models from a name, a folder or a hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apportion.errors import ModelError
from apportion.models.adapters import adapter_rows, widen_embeddings, with_adapter
from apportion.models.families import check_family, policy_class, refuse_left_out
from apportion.models.fast import use_fast_kernels
from apportion.models.files import ADAPTER_SETTINGS, has_weights, is_adapter, without_adapter
from apportion.models.pretrained import (
    NO_CODE,
    adapter_settings,
    base_of,
    fix_of,
    load_settings,
    named_positions,
    quiet,
    with_reason,
)
from apportion.models.stored_head import head_of, label_count
from apportion.system import cpu
from apportion.system.paths import local_path

NO_SDPA = "does not support an attention implementation through torch.nn.functional.scaled_dot_product_attention"
MODEL_FILES = ("config.json", ADAPTER_SETTINGS)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate(field: str, name: str) -> str:
    """Return the model folder or hub id of `name`, which the Auto classes can load. Loads nothing.

    Raises:
        ModelError: the folder is absent, has no config.json or no safetensors weights, or the name is none of these.
    """
    from apportion.data.assets import BUILTIN_MODELS, builtin_model

    if name in BUILTIN_MODELS:
        return str(builtin_model(name))
    path = local_path(name, field, ModelError)
    if name.strip() and os.path.isdir(path):  # unlike Path.is_dir, it is False without permission
        _check_folder(field, path)
        return str(path)
    expected = f"a built-in name ({', '.join(BUILTIN_MODELS)}), a model folder, or a hub id such as owner/name"
    # owner/name is a hub id unless `owner` is a folder here, which makes it a mistyped path
    local = os.path.exists(path) or name.startswith(".") or ("/" in name and Path(name.split("/")[0]).exists())
    if local or not HUB_ID.fullmatch(name):
        raise ModelError(field, name, expected, "There is no such folder: check the path.")
    return name


def _check_folder(field: str, path: Path) -> None:
    if not any((path / name).is_file() for name in MODEL_FILES):
        inside = sorted(one.parent for name in MODEL_FILES for one in path.glob(f"*/{name}"))
        named = str(max(inside, key=os.path.getmtime)) if inside else "RUN/final"
        fix = f"Point to the folder that `save_pretrained` wrote, such as {named}."
        raise ModelError(field, str(path), "a folder with config.json and weights", fix)
    if not has_weights(path):
        fix = "Save it again with `model.save_pretrained(folder)`; pickled weights (.bin) are not loaded."
        raise ModelError(field, str(path), "weights in safetensors beside config.json", fix)


def pick_device(name: str) -> torch.device:
    """Return the device: `auto` is the GPU if there is one. Raises ModelError when cuda is requested and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("device", name, "cpu or auto", "This PyTorch sees no GPU.")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype: `auto` is bfloat16 where the device has native products of it, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are native on `device` (AVX512-BF16 or AMX on a CPU)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe)() for probe in probes if hasattr(torch.cpu, probe))


SHORT = 256  # tokens


def use_fastest_attention(model: Any, device: torch.device, longest: int) -> None:
    """Set the attention implementation that trains `model` fastest on at most `longest` tokens.

    On a CPU the backward of sdpa costs more than the rest of a layer for short sequences: a step of 16 × 40 tokens of
    a 135M model takes 0.99 s with it and 0.65 s with eager attention, 4 × 256 take 1.32 s and 1.16 s. Eager attention
    saves (T,T) weights for its backward, so longer sequences use sdpa.
    """
    if device.type == "cpu" and longest <= SHORT and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")


def load_causal(
    field: str,
    folder: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    fast_kernels: bool = True,
    rows: int = 0,
) -> nn.Module:
    """Return the causal language model in `folder`, adapters merged, in evaluation mode.

    A checkpoint with parts beside its text (vision) is loaded whole, by the class that keeps them.

    Args:
        fast_kernels: compute with the equivalents of `models.fast`.
        rows: least number of embeddings. Added ones are the mean of the others, in the output layer too.

    Raises:
        ModelError: it cannot be loaded, weights are missing (they would be random), quantised or left out by its class,
            or it is of a family that cannot be a policy (`models.families`).
    """
    settings = load_settings(field, folder)
    check_family(field, folder, settings)
    auto = policy_class(settings)
    if is_adapter(folder):
        model, info = _adapted(field, folder, auto)
        model = model.to(dtype)  # merged in float32: merging in bfloat16 differs by 6e-3
    else:
        model, info = _from_pretrained(field, auto, folder, dtype)
    _refuse_missing(field, folder, info)
    refuse_left_out(field, folder, settings, info)
    widen_embeddings(model, rows)
    return prepared(model.to(device).eval(), fast_kernels)


def _adapted(field: str, folder: str, auto: Any, **kwargs: Any) -> tuple[Any, dict[str, list[str]]]:
    """Return (float32 model with the adapter in `folder` merged, loading info: weights missing in both, and unused)."""
    # not peft's own Auto classes, which instantiate any class of transformers that the adapter's settings name; a head
    # of the adapter's own takes the place of the base's, which may have another number of labels
    model, info = _from_pretrained(field, auto, folder, torch.float32, ignore_mismatched_sizes=True, **kwargs)
    merged, stored = with_adapter(field, folder, model)
    absent = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    missing = [key for key in absent if f"base_model.model.{key}" not in stored]
    return merged, {"missing_keys": missing, "unexpected_keys": list(info["unexpected_keys"])}


def _from_pretrained(field: str, auto: Any, folder: str, dtype: torch.dtype, **kwargs: Any) -> tuple[Any, Any]:
    """Return (the model in `folder`, or the base of the adapter in it, loading info with its missing keys)."""
    expected = f"weights that {auto.__name__} can load"
    try:
        loading: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, **NO_CODE}
        base = base_of(folder)
        if base != folder:
            expected = "an adapter whose base model can be loaded"
            loading["revision"] = adapter_settings(folder).get("revision")
        with quiet(), without_adapter(base) as where:
            loaded = _by_kernel(auto, where, loading | kwargs)
        loaded[0].name_or_path = loaded[0].config.name_or_path = base
        return loaded
    except Exception as error:  # transformers and peft raise many types, ImportError among them
        raise ModelError(field, with_reason(folder, error), expected, fix_of(error)) from error


def _by_kernel(auto: Any, folder: str, loading: dict[str, Any]) -> tuple[Any, Any]:
    """Return (model, loading info) with sdpa, or with eager attention for families without it, such as DeBERTa."""
    try:
        loaded: tuple[Any, Any] = auto.from_pretrained(folder, attn_implementation="sdpa", **loading)
    except ValueError as error:
        if NO_SDPA not in str(error):
            raise
        loaded = auto.from_pretrained(folder, attn_implementation="eager", **loading)
    return loaded


def _refuse_missing(field: str, folder: str, info: Any) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        fix = "These weights would be random. Train or save the model with them first."
        raise ModelError(field, f"{folder} without {missing[:3]}", "weights for every layer", fix)


def prepared(model: nn.Module, fast_kernels: bool = True) -> nn.Module:
    """Return `model` with its weights copied out of the memory-mapped file, whose alignment would change float32
    products bitwise, and with fast kernels if requested."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    if fast_kernels:
        use_fast_kernels(model)
    cpu.return_freed_memory()  # of the file and of copies in another dtype
    return model


def load_classifier(
    field: str,
    folder: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    new_head: int | None = None,
    fast_kernels: bool = True,
) -> nn.Module:
    """Return the sequence classifier in `folder`, in evaluation mode.

    Args:
        new_head: number of labels of a fresh head to train, N(0, 1/(d+1)); None requires a stored head.
        fast_kernels: compute with the equivalents of `models.fast`.

    Raises:
        ModelError: it cannot be loaded, its head is absent, or it has neither 1 nor 2 labels.
    """
    from transformers import AutoModelForSequenceClassification

    labels = stored_labels(field, folder) if new_head is None else new_head
    # left out where the configuration says the same, since it would take the labels' names away
    named = new_head is None and load_settings(field, folder).num_labels == labels
    kwargs: dict[str, Any] = {} if named else {"num_labels": labels}
    if is_adapter(folder):
        model, info = _adapted(field, folder, AutoModelForSequenceClassification, **kwargs)
        model = model.to(dtype)
    else:
        kwargs |= {"ignore_mismatched_sizes": True} if new_head is not None else {}
        model, info = _from_pretrained(field, AutoModelForSequenceClassification, folder, dtype, **kwargs)
    others: Any = info.get("mismatched_keys", ())  # (name, its two shapes) each
    absent = [*info["missing_keys"], *(key for key, *_ in others)]
    if new_head is None:
        _refuse_missing(field, folder, info)
    else:  # the stored head, of whatever size, is not used; nor need what is between it and the last states be there
        inside = [key for key in absent if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key]
        _refuse_missing(field, folder, {"missing_keys": inside})
        model.config.__dict__.pop("reward_mean", None)  # of the head that is not used
        head = _new_head(field, folder, model)
        torch.nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    return prepared(model.to(device).eval(), fast_kernels)


def _new_head(field: str, folder: str, model: nn.Module) -> nn.Linear:
    """Return the layer that gives the logits of a classifier. Raises ModelError where it is not one linear layer."""
    head = head_of(model)
    if isinstance(head, nn.Linear):
        return head
    what = "none by a known name" if head is None else f"a {type(head).__name__}"
    got = f"{folder}, a {type(model).__name__}, whose head is {what}"
    fix = "Start from a model of another family, such as Llama, Qwen, GPT-2 or BERT."
    raise ModelError(field, got, "a classifier whose head is one linear layer", fix)


def stored_labels(field: str, folder: str, *, download: bool = True) -> int:
    """Return the number of labels, 1 or 2, that the head stored in `folder` (or hub id) gives.

    Raises:
        ModelError: another number, or a classifier of another kind (`models.stored_head`).
    """
    settings = load_settings(field, folder)  # first: it refuses an adapter that names no base model
    return label_count(field, folder, base_of(folder), settings, download=download)


def embeddings_of(folder: str, settings: Any) -> int:
    """Return the number of ids that the model in `folder` with these `settings` has an embedding for.

    An adapter may store embeddings of its own, for tokens that were added. Loads no weights.
    """
    count = int(settings.get_text_config().vocab_size)
    return (adapter_rows(folder) or count) if folder and is_adapter(folder) else count


def context_of(folder: str, field: str = "policy") -> int:
    """Return the context length of the model in `folder`, in tokens, from its configuration.

    Raises:
        ModelError: settings that cannot be read.
    """
    config: Any = load_settings(field, folder).get_text_config()
    return named_positions(config, "max_position_embeddings", "n_positions") or 1 << 30
