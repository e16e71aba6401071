"""LoRA on any architecture: the layers to adapt, float32 adapters over a 16-bit base, exact merging."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from apportion.config.sections import LoraConfig
from apportion.errors import ConfigError
from apportion.models.families import text_modules
from apportion.models.fast import has_fast_kernels, use_fast_linear
from apportion.models.pretrained import reason

# a state-space layer (one with these parameters) multiplies with the weights of some of its layers without calling
# them, in its kernels or always, so that an adapter on them would do nothing; so does LongCat's router
STATE_SPACE = ("A_log", "D")
UNCALLED = ("conv1d", "dt_proj", "out_proj", "x_proj")


def is_linear(module: nn.Module) -> bool:
    """Whether peft can put an adapter on `module` (Linear, or GPT-2's Conv1D)."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def target_names(model: nn.Module, targets: Any) -> list[str]:
    """Return the full names of the layers to adapt: every linear layer inside an attention module, or in any block.

    A model with parts beside its text (vision) is adapted in its language model only. The output layer is never
    adapted: log-probabilities are computed from its stored weights. Nor is a layer whose weight is another's too
    (Zamba's blocks share theirs): each would learn an adapter of its own, and one weight cannot hold two.

    Raises:
        ConfigError: `targets` is neither "attention", "all" nor a list of names that occur.
    """
    modules, text = dict(model.named_modules()), text_modules(model)
    linear = [name for name, module in modules.items() if is_linear(module) and module in text]
    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    owners = Counter(id(getattr(module, "weight", None)) for _, module in model.named_modules(remove_duplicate=False))
    linear = [name for name in linear if owners[id(modules[name].weight)] == 1]
    linear = [name for name in linear if modules[name] is not head and not _is_uncalled(modules, name)]
    if targets == "attention":
        inside = {name for name, module in modules.items() if "attention" in type(module).__name__.lower()}
        chosen = [name for name in linear if any(name.startswith(f"{parent}.") for parent in inside)]
    elif targets == "all":
        chosen = [name for name in linear if any(part.isdigit() for part in name.split("."))]  # inside a block
    else:
        wanted = {targets} if isinstance(targets, str) else set(targets)
        chosen = [name for name in linear if name.split(".")[-1] in wanted]
        if wanted - {name.split(".")[-1] for name in chosen}:  # every name must occur
            chosen = []
    if not chosen:
        known = sorted({name.split(".")[-1] for name in linear})
        fix = "Use attention, all, or a list of layer names."
        raise ConfigError(
            "lora.targets", targets, f"layers of this model: {', '.join(known) or 'it has none to adapt'}", fix
        )
    return chosen


def _is_uncalled(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether the layer `name` is part of a state-space layer or router that reads its weight without calling it."""
    parent, _, last = name.rpartition(".")
    router = type(modules[parent]).__name__.endswith("Router")
    return router or (last in UNCALLED and all(hasattr(modules[parent], one) for one in STATE_SPACE))


def add_adapter(model: nn.Module, config: LoraConfig, *, head: str | None = None) -> Any:
    """Return the peft model: adapters in float32 over `model`, dropout 0, `head` (if named) trained in full.

    The adapters use fast kernels where `model` does.

    Raises ConfigError as `target_names` does.
    """
    from peft import get_peft_model

    settings, fast = adapter_settings(model, config, head=head), has_fast_kernels(model)
    try:
        adapted = get_peft_model(model, settings, autocast_adapter_dtype=True)
    except ValueError as error:  # layers that peft cannot adapt
        expected = "layers that peft can adapt"
        raise ConfigError("lora.targets", f"{config.targets} ({reason(error)})", expected, "Name others.") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # peft leaves modules_to_save in bf16, where small updates vanish
            parameter.data = parameter.data.float()
    if fast:
        use_fast_linear(adapted)
    if head is not None:
        adapted.get_submodule(f"base_model.model.{head}").register_forward_pre_hook(lambda _, args: (args[0].float(),))
    return adapted


def adapter_settings(model: nn.Module, config: LoraConfig, *, head: str | None = None) -> Any:
    """Return peft's settings for adapters on `model`: dropout 0, `head` (if named) trained in full.

    Raises ConfigError as `target_names` does.
    """
    from peft import LoraConfig as PeftConfig

    names = target_names(model, config.targets)
    first = dict(model.named_modules())[names[0]]
    return PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=names,
        fan_in_fan_out=type(first).__name__ == "Conv1D",
        modules_to_save=None if head is None else [head],
        task_type=None,
    )


def merged_copy(adapted: Any, base: nn.Module) -> nn.Module:
    """Return `base` (float32, freshly loaded) with the adapters and trained head of `adapted` merged into it."""
    from peft import get_peft_model

    fresh = get_peft_model(base, adapted.peft_config["default"], autocast_adapter_dtype=True)
    target = dict(fresh.named_parameters())
    with torch.no_grad():
        # by the parameters' own names: peft's state dict loses those of a layer such as `weight_proj`, without a word
        for name, value in adapted.named_parameters():
            if any(part in name for part in (".lora_", ".modules_to_save.")):
                target[name].copy_(value)
        merged: nn.Module = fresh.merge_and_unload()
        return merged
