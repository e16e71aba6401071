"""Loading of models and tokenizers from a name, a folder or a hub id."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from apportion.errors import ModelError
from apportion.models.fast import use_fast_kernels
from apportion.models.stored_head import label_count
from apportion.system import cpu
from apportion.system.paths import local_path

# errors of transformers, peft and safetensors for a damaged or unsuitable folder
LOAD_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    SafetensorError,
)
SAFE_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
ADAPTER = "adapter_model.safetensors"
FIX = "Check the folder or id, and save it again if it is damaged; a hub id needs the network or a cached copy."
# code in a model's folder is never run; with the default, transformers would ask on the terminal
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
NO_SDPA = "does not support an attention implementation through torch.nn.functional.scaled_dot_product_attention"
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
    adapter = (path / "adapter_config.json").is_file()
    if not adapter and not (path / "config.json").is_file():
        fix = "Point to the folder that `save_pretrained` wrote, such as RUN/final."
        raise ModelError(field, str(path), "a folder with config.json and weights", fix)
    # an adapter's weights have one name; beside other safetensors, peft would unpickle adapter_model.bin
    patterns = (ADAPTER,) if adapter and not any(path.glob("model*.safetensors")) else SAFE_WEIGHTS
    if not any(next(path.glob(pattern), None) for pattern in patterns):
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


def load_tokenizer(field: str, folder: str, pad_token: str | None = None) -> Any:
    """Return the tokenizer in `folder` (or hub id), with a pad token distinct from EOS.

    Raises:
        ModelError: there is none, it has no EOS, or its pad token is absent or equal to EOS.
    """
    return with_pad(field, read_tokenizer(field, folder), pad_token)


def read_tokenizer(field: str, folder: str) -> Any:
    """Return the tokenizer in `folder` (or hub id) as stored. Raises ModelError when there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **NO_CODE)
        _check_templates(tokenizer.chat_template)
        return tokenizer
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise ModelError(field, _with_reason(folder, error), "a folder or hub id with a tokenizer", FIX) from error


def _check_templates(templates: Any) -> None:
    """Raise ValueError for named chat templates that could not be saved as a file of that name."""
    names = templates if isinstance(templates, dict) else {}
    invalid = next((str(name) for name in names if not re.fullmatch(r"[\w.-]+", str(name)) or ".." in str(name)), None)
    if invalid is not None:
        raise ValueError(f"a chat template named {invalid[:60]!r}")


def with_pad(field: str, tokenizer: Any, pad_token: str | None) -> Any:
    """Return `tokenizer` with `pad_token`, or its own, as pad token. Raises ModelError as `load_tokenizer`."""
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            ends = (tokenizer.eos_token, tokenizer.bos_token)
            reserved = [str(t) for t in tokenizer.added_tokens_decoder.values() if str(t) not in ends][:8]
            fix = f"Choose a reserved token that never occurs in text, such as one of {reserved}."
            raise ModelError("pad_token", pad_token, "a token of the tokenizer's vocabulary", fix)
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        got = f"pad {tokenizer.pad_token!r}, eos {tokenizer.eos_token!r}"
        fix = "Pass --pad_token with a reserved token of the vocabulary that never occurs in text."
        raise ModelError(f"{field}'s tokenizer", got, "a pad token distinct from EOS", fix)
    return tokenizer


def load_settings(field: str, folder: str) -> Any:
    """Return the configuration of the model in `folder` (or hub id), or of an adapter's base model, without weights.

    Raises:
        ModelError: it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base_of(folder), **NO_CODE)
    except LOAD_ERRORS as error:
        expected = "a config.json that transformers can read"
        raise ModelError(field, _with_reason(folder, error), expected, FIX) from error


def _is_adapter(folder: str) -> bool:
    """Whether `folder` holds an adapter and no full model, with or without a config.json."""
    path = Path(folder)
    return (path / "adapter_config.json").is_file() and next(path.glob("model*.safetensors"), None) is None


def base_of(folder: str) -> str:
    """Return the base model of the adapter in `folder`, or `folder` itself when it holds a full model.

    Raises:
        ValueError: the adapter names no base model.
    """
    if not _is_adapter(folder):
        return folder
    base = _adapter_settings(folder).get("base_model_name_or_path")
    if not base:
        raise ValueError("its adapter_config.json names no base model")
    return str(base)


def _adapter_settings(folder: str) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    return settings


def _with_reason(folder: str, error: Exception) -> str:
    """Return the folder with the first line of the library's error."""
    return f"{folder} ({(str(error).splitlines() or [type(error).__name__])[0]})"


def load_causal(
    field: str, folder: str, dtype: torch.dtype, device: torch.device, *, fast_kernels: bool = True
) -> nn.Module:
    """Return the causal language model in `folder`, adapters merged, in evaluation mode.

    With `fast_kernels` its layers compute with the equivalents of `models.fast`.

    Raises:
        ModelError: it cannot be loaded, or weights are missing (they would be random).
    """
    from transformers import AutoModelForCausalLM

    if _is_adapter(folder):
        model, info = _adapted(field, folder, AutoModelForCausalLM)
        model = model.to(dtype)  # merged in float32: merging in bfloat16 differs by 6e-3
    else:
        model, info = _from_pretrained(field, AutoModelForCausalLM, folder, dtype)
    _refuse_missing(field, folder, info)
    return prepared(model.to(device).eval(), fast_kernels)


def _adapted(field: str, folder: str, auto: Any, **kwargs: Any) -> tuple[Any, dict[str, list[str]]]:
    """Return (float32 model with the adapter in `folder` merged, {"missing_keys": weights stored in neither})."""
    from peft import PeftModel

    # not peft's own Auto classes, which instantiate any class of transformers that the adapter's settings name
    model, info = _from_pretrained(field, auto, folder, torch.float32, **kwargs)
    try:
        stored = load_file(Path(folder) / ADAPTER)
        _widen(model, stored)
        with _no_missing_key_warning():
            adapted = PeftModel.from_pretrained(model, folder)
    except LOAD_ERRORS as error:
        raise ModelError(field, _with_reason(folder, error), "an adapter that fits its base model", FIX) from error
    missing = [key for key in info["missing_keys"] if f"base_model.model.{key}" not in stored]
    return _merged(field, folder, adapted), {"missing_keys": missing}


def _widen(model: Any, stored: Mapping[str, torch.Tensor]) -> None:
    """Resize `model` to the vocabulary of an adapter that stores its own embeddings, for added tokens."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    embedded = [stored.get(f"base_model.model.{name}.{end}") for end in ("weight", "base_layer.weight")]
    rows = next((len(weight) for weight in embedded if weight is not None), embeddings.num_embeddings)
    if rows != embeddings.num_embeddings:
        model.resize_token_embeddings(rows)


@contextmanager
def _no_missing_key_warning() -> Iterator[None]:
    """Suppress peft's warning about missing weights of an adapter, which `_merged` makes an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        yield


def _merged(field: str, folder: str, adapted: Any) -> nn.Module:
    """Return the model with its adapter merged into it.

    Raises:
        ModelError: weights of the adapter are missing in its file, or match no layer (peft ignores both, with a warning
            at most), or it is of a kind that cannot be merged.
    """
    if not callable(getattr(adapted, "merge_and_unload", None)):
        got = f"{folder}, an adapter of the kind {adapted.active_peft_config.peft_type.value}"
        fix = "Merge it into its base model with the library that made it, and give the result."
        raise ModelError(field, got, "an adapter that can be merged, such as LoRA", fix)
    try:
        result = adapted.load_adapter(folder, "default", torch_device="cpu")  # a second time: only this reports keys
        unmatched = sorted({*result.missing_keys, *result.unexpected_keys})
        if not unmatched:
            model: nn.Module = adapted.merge_and_unload()
            return model
    except LOAD_ERRORS as error:
        raise ModelError(field, _with_reason(folder, error), "an adapter that fits its base model", FIX) from error
    got = f"{folder}, whose {ADAPTER} and layers differ in {len(unmatched)} weights: {', '.join(unmatched[:3])}"
    fix = "It was saved under other names or for another model: save it again with `save_pretrained`."
    raise ModelError(field, got, "an adapter that fits its base model", fix)


def _from_pretrained(field: str, auto: Any, folder: str, dtype: torch.dtype, **kwargs: Any) -> tuple[Any, Any]:
    """Return (the model in `folder`, or the base of the adapter in it, loading info with its missing keys)."""
    expected = f"weights that {auto.__name__} can load"
    try:
        loading: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, **NO_CODE}
        if _is_adapter(folder):
            expected = "an adapter whose base model can be loaded"
            loading["revision"] = _adapter_settings(folder).get("revision")
        base, loading = base_of(folder), loading | kwargs
        try:
            loaded: tuple[Any, Any] = auto.from_pretrained(base, attn_implementation="sdpa", **loading)
        except ValueError as error:
            if NO_SDPA not in str(error):
                raise
            loaded = auto.from_pretrained(base, attn_implementation="eager", **loading)  # such as DeBERTa
        return loaded
    except LOAD_ERRORS as error:
        raise ModelError(field, _with_reason(folder, error), expected, FIX) from error


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
    kwargs = {} if new_head is None and load_settings(field, folder).num_labels == labels else {"num_labels": labels}
    if _is_adapter(folder):
        model, info = _adapted(field, folder, AutoModelForSequenceClassification, **kwargs)
        model = model.to(dtype)
    else:
        model, info = _from_pretrained(field, AutoModelForSequenceClassification, folder, dtype, **kwargs)
    if new_head is None:
        _refuse_missing(field, folder, info)
    else:
        head = next(m for name, m in model.named_children() if name in ("score", "classifier"))
        width = head.weight.shape[1]
        torch.nn.init.normal_(head.weight, std=(width + 1) ** -0.5)
    return prepared(model.to(device).eval(), fast_kernels)


def stored_labels(field: str, folder: str, *, download: bool = True) -> int:
    """Return the number of labels, 1 or 2, that the head stored in `folder` (or hub id) gives.

    Raises:
        ModelError: another number, or a classifier of another kind (`models.stored_head`).
    """
    settings = load_settings(field, folder)  # first: it refuses an adapter that names no base model
    return label_count(field, folder, base_of(folder), settings, download=download)


def context_of(folder: str, field: str = "policy") -> int:
    """Return the context length of the model in `folder`, in tokens, from its configuration.

    Raises:
        ModelError: settings that cannot be read.
    """
    config: Any = load_settings(field, folder).get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 30)
