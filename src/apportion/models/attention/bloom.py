"""Capture of BLOOM's attention, which does not use transformers' registry, by module hooks."""

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


def capture(attention: nn.Module, record: Record) -> list[RemovableHandle]:
    """Call `record` with the inputs and output of this attention module at each forward, until the handles are removed.

    Its fused projection gives query, key and value; its arguments the mask and ALiBi's bias (Press et al. 2022,
    arXiv 2108.12409), one number a key and head for every query; the input of its output projection
    is weights·values.
    """
    captured: dict[str, Any] = {}

    def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(("hidden_states", "residual", "alibi", "attention_mask"), args, strict=False)) | kwargs
        captured.update(mask=named["attention_mask"], alibi=named["alibi"])

    def projected(module: nn.Module, args: tuple[Any, ...], fused: Tensor) -> None:
        captured["qkv"] = [x.detach() for x in attention._reshape(fused)]  # type: ignore[operator]

    def mixed(module: nn.Module, args: tuple[Tensor]) -> None:
        captured["output"] = args[0].detach()

    def finished(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        record(_call(module, captured))
        captured.clear()

    inner: Any = attention
    return [
        attention.register_forward_pre_hook(arguments, with_kwargs=True),
        inner.query_key_value.register_forward_hook(projected),
        inner.dense.register_forward_pre_hook(mixed),
        attention.register_forward_hook(finished),
    ]


def _call(module: Any, captured: dict[str, Any]) -> Call:
    query, key, value = captured["qkv"]
    batch, heads, length, size = query.shape
    if captured["alibi"].shape[-1] != length:
        got = f"{length} tokens after {captured['alibi'].shape[-1] - length} cached ones"
        raise ModelError("attention_row(Bloom)", got, "one forward without a cache", "Run the model on the full text.")
    settings = {"scaling": module.inv_norm_factor, "is_causal": True, "dropout": _dropout(module)}
    output = captured.get("output")  # absent where the output projection is applied in slices
    output = None if output is None else output.view(batch, length, heads, size)
    bias = captured["alibi"].detach().view(batch, heads, length)
    return Call(module, query, key, value, captured["mask"], settings, output, bias)


def _dropout(module: Any) -> float:
    return float(module.attention_dropout.p) if module.training else 0.0
