"""Families of policies: the class that loads one, the part of it that is text, and those that are refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from apportion.errors import ApportionError, ModelError
from apportion.models.pretrained import reason
from apportion.system.memory import is_out_of_memory

# families that cannot be sampled from and trained in batches of padded rows, and why
LATER = "it attends to later tokens, and is no causal language model"
SHIFTED = "its positions count padding, so that a text's log-probabilities depend on the batch"
REFUSED = {
    "blt": "it cuts bytes into patches of its own, and has no cache of one kind",
    "cpmant": LATER,
    "deepseek_v4": "it joins tokens into blocks, and padding moves their borders",
    "prophetnet": LATER,
    "recurrent_gemma": "its convolutions read padding as text",
    "reformer": "its backward pass runs with dropout only",
    "rwkv": "it ignores the attention mask, so that padding changes its state",
    "xlnet": LATER,
    "xlstm": "it ignores the attention mask, so that padding changes its state",
} | dict.fromkeys(
    (
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert", "data2vec-text", "marian", "mbart",
        "mvp", "pegasus", "plbart", "roberta", "roberta-prelayernorm", "roformer", "trocr", "xlm", "xlm-roberta",
        "xlm-roberta-xl", "xmod",
    ),
    SHIFTED,
)  # fmt: skip
OTHERS = "Use a causal language model such as Llama, Qwen, Gemma, Mistral, GPT-2, Mamba or Falcon."


def bare(model: Any) -> Any:
    """Return `model` without the wrapper of adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_family(field: str, folder: str, settings: Any) -> None:
    """Raise ModelError for a family that cannot be a policy, by its `settings`. Needs no weights."""
    why = REFUSED.get(str(getattr(settings, "model_type", "")))
    if why is not None:
        got = f"{folder}, a model of the family {settings.model_type}: {why}"
        raise ModelError(field, got, "a causal language model that can be sampled from in batches", OTHERS)


@contextmanager
def forward_errors(field: str, model: Any, what: str, expected: str, fix: str) -> Iterator[None]:
    """Turn an error of the model's own code inside the block into a ModelError: `model`, which cannot `what` (reason).

    Classes of transformers raise many types for inputs, and for settings, that they cannot work with. Errors of this
    package, and of lack of memory, stay as they are.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ApportionError) or is_out_of_memory(error):
            raise
        got = f"{type(bare(model)).__name__}, which cannot {what} ({reason(error)})"
        raise ModelError(field, got, expected, fix) from error


def has_other_parts(settings: Any) -> bool:
    """Whether a model has parts beside its text (vision, sound), by its settings."""
    text = settings.get_text_config()
    return text is not settings and bool(set(getattr(settings, "sub_configs", {})) - {"text_config"})


def policy_class(settings: Any) -> Any:
    """Return the Auto class that loads a policy whole: with its vision part, where the checkpoint has one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    kind = settings.model_type
    whole, text = (
        names.get(kind) for names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    )
    stored = (getattr(settings, "architectures", None) or [None])[0]
    if whole is None or not has_other_parts(settings) or (stored == text and stored != whole):
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def refuse_left_out(field: str, folder: str, settings: Any, info: Any) -> None:
    """Raise ModelError where the class of a model with parts beside its text left some of its weights out."""
    unused = sorted(info["unexpected_keys"]) if has_other_parts(settings) else []
    if unused:
        got = f"{folder}, of whose weights {len(unused)} belong to no layer that transformers knows: {unused[:3]}"
        fix = "The trained model would lose them: use a newer transformers, or a checkpoint of the text model alone."
        raise ModelError(field, got, "a checkpoint that is loaded whole", fix)


def text_decoder(model: Any) -> nn.Module | None:
    """Return the language model within `model` where it has other parts too, else None: all of it is text."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config") or not has_other_parts(config):
        return None
    decoder: nn.Module = model.get_decoder()
    return None if decoder in (model, getattr(model, "base_model", None)) else decoder


def text_modules(model: Any) -> set[nn.Module]:
    """Return the modules of `model` that compute text: all, or the language model and the output layer."""
    decoder = text_decoder(model)
    if decoder is None:
        return set(model.modules())
    head = model.get_output_embeddings()
    return {*decoder.modules(), *(() if head is None else head.modules())}


def freeze_other_parts(model: Any) -> None:
    """Exclude every weight that text does not use from training."""
    decoder = text_decoder(model)
    if decoder is None:
        return
    learning = {p for module in text_modules(model) for p in module.parameters()}
    for parameter in model.parameters():
        if parameter not in learning:
            parameter.requires_grad_(False)
