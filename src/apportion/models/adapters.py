"""Stored adapters: applied to their base model, merged, and the result compared with the adapter's own logits."""

from __future__ import annotations

import copy
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from apportion.errors import ModelError
from apportion.models.files import ADAPTER, stored_shapes
from apportion.models.pretrained import fix_of, quiet, with_reason

# input embeddings: Llama and its like, GPT-2, GPT-NeoX, BLOOM and Falcon, encoders, T5
EMBEDDINGS = re.compile(r"\.(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|shared)(\.base_layer)?\.weight$")
OUTPUT = re.compile(r"\.(lm_head|embed_out)\.")
MERGED = 1e-4  # largest difference in a logit that merging may make, in units of the largest logit or 1
PROBED = 12  # tokens on which the merged model is compared with the adapter


def with_adapter(field: str, folder: str, model: Any) -> tuple[nn.Module, Container[str]]:
    """Return (`model` (float32) with the adapter in `folder` merged into it, the names of the adapter's weights).

    The merged model gives the adapter's own logits, also where the adapter changes embeddings that are tied to the
    output layer: the output layer then gets weights of its own.

    Raises:
        ModelError: weights of the adapter are missing in its file, or match no layer (peft ignores both, with a warning
            at most), it cannot be merged, or merging changes the logits.
    """
    try:
        stored = stored_shapes(folder)
        _widen(model, stored)
        spare = copy.deepcopy(model) if _changes_tied(model, stored) else None
        merged, expected = _merge(field, folder, model, stored)
        gap = _gap(merged, expected)
        if gap > MERGED and spare is not None:
            untie(spare)
            merged, _ = _merge(field, folder, spare, stored)
            gap = _gap(merged, expected)
    except ModelError:
        raise
    except Exception as error:  # peft raises many types
        expected_kind = "an adapter that fits its base model"
        raise ModelError(field, with_reason(folder, error), expected_kind, fix_of(error)) from error
    if not gap <= MERGED:
        got = f"{folder}, whose logits change by {gap:.2g} of the largest when it is merged"
        fix = "Merge it into its base model with the library that made it, and give the result."
        raise ModelError(field, got, "an adapter that can be merged exactly", fix)
    if _own_head(merged):
        _record_untied(merged)
    return merged, stored


class _Expected:
    """Ids (1,n), and the logits of the adapter on them before it was merged."""

    def __init__(self, ids: Tensor, logits: Tensor) -> None:
        self.ids, self.logits = ids, logits


def _merge(field: str, folder: str, model: Any, stored: Container[str]) -> tuple[nn.Module, _Expected]:
    """Return (the model with the adapter merged, its logits before), after every weight was found."""
    from peft import PeftConfig, PeftModel

    with quiet():
        settings = PeftConfig.from_pretrained(folder)
        if settings.task_type == "CAUSAL_LM" and not hasattr(model, "prepare_inputs_for_generation"):
            settings.task_type = None  # a language model's adapter, under a classifier that is to be trained on it
        adapted = PeftModel.from_pretrained(model, folder, config=settings)
    if not callable(getattr(adapted, "merge_and_unload", None)):
        got = f"{folder}, an adapter of the kind {adapted.active_peft_config.peft_type.value}"
        fix = "Merge it into its base model with the library that made it, and give the result."
        raise ModelError(field, got, "an adapter that can be merged, such as LoRA", fix)
    with quiet():
        result = adapted.load_adapter(folder, "default", torch_device="cpu")  # a second time: only this reports keys
    unused = (key for key in result.unexpected_keys if not (_is_copy(key, stored) or _is_output(key, model)))
    unmatched = sorted({*result.missing_keys, *unused})
    if unmatched:
        got = f"{folder}, whose {ADAPTER} and layers differ in {len(unmatched)} weights: {', '.join(unmatched[:3])}"
        fix = "It was saved under other names or for another model: save it again with `save_pretrained`."
        raise ModelError(field, got, "an adapter that fits its base model", fix)
    ids = _probe_ids(model, adapted)
    expected = _Expected(ids, _logits(adapted.eval(), ids))
    with quiet():
        merged: nn.Module = adapted.merge_and_unload()
    return merged, expected


def _is_copy(key: str, stored: Container[str]) -> bool:
    """Whether a weight is stored under its usual name as well: peft writes embeddings of a new size three times."""
    layer, _, end = key.rpartition(".")
    whole, _, copy_of = layer.rpartition(".")
    return copy_of in ("modules_to_save", "original_module") and f"{whole}.{end}" in stored


def _is_output(key: str, model: Any) -> bool:
    """Whether a weight is of a language model's output layer, which a classifier does not have."""
    return model.get_output_embeddings() is None and OUTPUT.search(key) is not None


def _probe_ids(model: Any, adapted: Any) -> Tensor:
    """Return ids (1,n) over the whole vocabulary, those of single trained tokens among them."""
    rows = model.get_input_embeddings().weight.shape[0]
    spread = torch.linspace(0, rows - 1, PROBED).long().tolist()
    trained = getattr(adapted.active_peft_config, "trainable_token_indices", None) or []
    lists = trained.values() if isinstance(trained, Mapping) else [trained]
    more = [int(i) for one in lists for i in one][:PROBED]
    return torch.tensor([[*spread, *more]])


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids).logits
    return logits


def _gap(model: nn.Module, expected: _Expected) -> float:
    """Return the largest difference in a logit, in units of the largest logit or 1."""
    logits = _logits(model.eval(), expected.ids)
    scale = max(1.0, float(expected.logits.abs().max()))
    return float((logits - expected.logits).abs().max()) / scale


def _changes_tied(model: Any, stored: Iterable[str]) -> bool:
    """Whether the adapter changes embeddings, or an output layer, that share their weights."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or getattr(head, "weight", None) is not embeddings.weight:
        return False
    names = [name for name, module in model.named_modules() if module is head or module is embeddings]
    return any(f".{name}." in f".{key}." for name in names for key in stored)


def untie(model: Any) -> None:
    """Give the output layer of `model` weights of its own, equal to the embeddings that it shared."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    _record_untied(model)


def _own_head(model: Any) -> bool:
    """Whether the settings of `model` tie its output layer, and merging gave it weights of its own."""
    head = model.get_output_embeddings()
    if head is None or not model.config.get_text_config().tie_word_embeddings:
        return False
    return getattr(head, "weight", None) is not model.get_input_embeddings().weight


def _record_untied(model: Any) -> None:
    """Record in the settings that the output layer has weights of its own, so that they are saved and loaded."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    tied = getattr(model, "all_tied_weights_keys", {})
    model.all_tied_weights_keys = {key: source for key, source in tied.items() if not key.startswith(f"{name}.")}


def _widen(model: Any, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Resize `model` to the vocabulary of an adapter that stores its own embeddings, for added tokens.

    Args:
        stored: the shapes of the adapter's weights.
    """
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    embedded = [stored.get(f"base_model.model.{name}.{end}") for end in ("weight", "base_layer.weight")]
    rows = next((shape[0] for shape in embedded if shape is not None), embeddings.num_embeddings)
    if rows != embeddings.num_embeddings:
        model.resize_token_embeddings(rows)


def adapter_rows(folder: str) -> int | None:
    """Return the number of embeddings that the adapter in `folder` stores, for added tokens; None where it has none.

    The names of layers of embeddings are those of transformers' models.
    """
    try:
        shapes = stored_shapes(folder, lambda name: EMBEDDINGS.search(name) is not None)
    except (SafetensorError, OSError):  # said where it is loaded
        return None
    return max((shape[0] for shape in shapes.values()), default=None)


@torch.no_grad()
def widen_embeddings(model: Any, rows: int) -> None:
    """Give `model` at least `rows` embeddings; the new ones are the mean of the others, in the output layer too.

    The random state stays as it is, so that a run does not depend on whether its pad token was added.
    """
    count = model.get_input_embeddings().weight.shape[0]
    if rows <= count:
        return
    with torch.random.fork_rng(devices=[]), quiet():
        model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for tensor in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
            if tensor is not None and len(tensor) == rows:
                tensor[count:] = tensor[:count].float().mean(dim=0).to(tensor.dtype)
