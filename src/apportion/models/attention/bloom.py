"""BLOOM's attention, which never uses transformers' registry: query, key, ALiBi and mask caught by module hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from apportion.errors import ModelError
from apportion.models.attention.softmax import Call

Record = Callable[[Call], None]


def layers(model: nn.Module) -> list[nn.Module]:
    """Return BLOOM's attention modules in order; none for another architecture."""
    return [m for m in model.modules() if any(k.__name__ == "BloomAttention" for k in type(m).__mro__)]


def monitor(attention: nn.Module, record: Record) -> list[RemovableHandle]:
    """Call `record` with what this attention module computed, each time it runs, until the handles are removed.

    Its fused projection gives query, key and value; its arguments the mask and ALiBi's bias (Press et al. 2022,
    arXiv 2108.12409), a number a key and head that is the same for every query; the input of its output projection
    is weights·values.
    """
    given: dict[str, Any] = {}

    def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(("hidden_states", "residual", "alibi", "attention_mask"), args, strict=False)) | kwargs
        given.update(mask=named["attention_mask"], alibi=named["alibi"])

    def projected(module: nn.Module, args: tuple[Any, ...], fused: Tensor) -> None:
        given["qkv"] = [x.detach() for x in attention._reshape(fused)]  # type: ignore[operator]

    def mixed(module: nn.Module, args: tuple[Tensor]) -> None:
        given["output"] = args[0].detach()

    def finished(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        record(_call(module, given))
        given.clear()

    inner: Any = attention
    return [
        attention.register_forward_pre_hook(arguments, with_kwargs=True),
        inner.query_key_value.register_forward_hook(projected),
        inner.dense.register_forward_pre_hook(mixed),
        attention.register_forward_hook(finished),
    ]


def _call(module: Any, given: dict[str, Any]) -> Call:
    query, key, value = given["qkv"]
    batch, heads, length, size = query.shape
    if given["alibi"].shape[-1] != length:
        got = f"{length} tokens after {given['alibi'].shape[-1] - length} cached ones"
        raise ModelError("attention_row(Bloom)", got, "one forward without a cache", "Feed the whole text.")
    settings = {"scaling": module.inv_norm_factor, "is_causal": True, "dropout": _dropout(module)}
    output = given.get("output")  # absent where the output projection is applied in slices
    output = None if output is None else output.view(batch, length, heads, size)
    bias = given["alibi"].detach().view(batch, heads, length)
    return Call(module, query, key, value, given["mask"], settings, output, bias)


def _dropout(module: Any) -> float:
    return float(module.attention_dropout.p) if module.training else 0.0
