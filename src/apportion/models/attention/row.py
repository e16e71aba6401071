"""Capture of chosen rows of a model's attention layers during its ordinary forward pass.

The attention function that the model uses is wrapped in transformers' registry within a `with` block. It
receives q and k after rotary embedding and norms, the mask and the scaling, so one softmax row costs O(H·T·d); no
(T,T) matrix is made and `output_attentions` (which changes the kernel) is never used. Shapes: B rows of the batch,
R chosen positions, L chosen layers, H heads, K keys.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from apportion.credit import AttentionSpec
from apportion.credit._attention_spec import Layers, check_layers
from apportion.distributed.sharding import plain_class
from apportion.errors import ModelError
from apportion.models.attention import bloom
from apportion.models.attention.softmax import Call, is_causal, output_gap, softmax_rows
from apportion.models.families import bare

CHUNK_ELEMENTS = 1 << 24  # 64 MiB of float32 scores at a time
# keyword arguments that change the attention weights and are not supported here
UNSUPPORTED = ("position_bias", "cu_seq_lens_q", "cu_seq_lens_k")
FIX = "Use a credit that needs no attention (uniform, sparse) with this model, or a model of another family."


class AttentionTap:
    """The captured inputs of the chosen layers of one forward pass; `weights` computes rows from them on demand."""

    def __init__(self, model: nn.Module, layers: Layers) -> None:
        self._name = _name(model)
        self._modules = set(model.modules())
        self._depth = _depth(model, self._name)
        self.layers = resolve_layers(layers, self._depth, self._name)
        self._forwards = 0
        self._running = False
        self._seen = 0
        self._calls: dict[int, Call] = {}
        self._checked: set[int] = set()

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._forwards += 1
        if self._forwards > 1:
            raise RuntimeError(
                f"attention_row: {self._name} ran a second forward in one `with` block; expected one. "
                "Open a new block for each forward, or the rows would belong to another batch."
            )
        self._running = True

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._running = False  # gradient checkpointing reruns layers in the backward pass, in reverse order

    def _record(self, call: Call) -> None:
        if not self._running or call.module not in self._modules:
            return
        if self._seen in self.layers:  # layers run in order
            self._calls[self._seen] = call
        self._seen += 1

    def weights(self, rows: Tensor) -> Tensor:
        """Return the last chosen layer's post-softmax rows in float32, exactly 0 on masked keys.

        Args:
            rows: (B,) int64 query positions in the padded input, one a batch row, or (B,R) several.

        Returns:
            (B,H,K) for (B,), (B,R,H,K) for (B,R); columns are key positions, prompt and pads included. Detached.

        Raises:
            ModelError: no forward ran in the block, or this model's attention cannot be reproduced exactly.
        """
        return self._weights(self.layers[-1], rows)

    def layer_weights(self, rows: Tensor) -> Tensor:
        """Return every chosen layer's rows, (B,L,H,K) for `rows` (B,), (B,R,L,H,K) for (B,R), in order of depth.

        Costs O(L·H·K·d) a position. Raises as `weights` does.
        """
        return torch.stack([self._weights(layer, rows) for layer in self.layers], dim=-3)

    def rollout(self, rows: Tensor) -> Tensor:
        """Return the attention rollout at `rows` (B,): (B,K) float32, the part of each input position.

        One row of the product over all layers of ½(A + I), A averaged over heads. It is computed backwards as a
        vector times each layer's matrix, row ← ½(row·A + row), a few of A's rows at a time: O(L·H·T²·d) operations,
        about those of the model's own attention scores, without a T×T matrix in memory. The row sums to 1, or to less
        where sink logits take mass. Every layer's q, k and v stay in memory until the tap is deleted.

        Raises:
            ModelError: as `weights` does; the block was not opened with layers="all"; or keys came from a cache.

        Source: Abnar & Zuidema 2020 (arXiv 2005.00928), section 3.
        """
        if len(self.layers) != self._depth:
            fix = 'Open the block with attention_row(model, layers="all").'
            raise ModelError(f"rollout({self._name})", f"layers {list(self.layers)}", "all layers", fix)
        queries, keys = self._call(0).query.shape[2], self._call(0).key.shape[2]
        if queries != keys:
            got = f"{queries} queries over {keys} keys"
            raise ModelError(f"rollout({self._name})", got, "as many", "Run the model without a cache.")
        row = nn.functional.one_hot(rows, keys).float()
        for layer in reversed(self.layers):
            row = 0.5 * (self._through(layer, row) + row)
        return row

    def attention(self, spec: AttentionSpec, rows: Tensor) -> Tensor:
        """Return the attention (B,K) at `rows` (B,) of `spec`, heads and layers reduced to one row.

        Heads are reduced by mean or maximum in each layer; layers are then averaged.
        """
        if spec.rollout:
            return self.rollout(rows)
        chosen = resolve_layers(spec.layers, self._depth, self._name)
        weights = [self._weights(layer, rows) for layer in chosen]
        reduced = [w.amax(dim=1) if spec.heads == "max" else w.mean(dim=1) for w in weights]
        return torch.stack(reduced).mean(dim=0)

    @property
    def causal(self) -> bool:
        """Whether the last chosen layer is causal (a decoder's). Raises ModelError before a forward."""
        return is_causal(self._call(self.layers[-1]))

    def _call(self, layer: int) -> Call:
        """Return the call of that layer. Raises ModelError unless every layer ran exactly once."""
        field = f"attention_row({self._name})"
        if self._forwards == 0:
            fix = "Call the model inside the `with` block."
            raise ModelError(field, "no forward pass", "one forward of the model", fix)
        if self._seen != self._depth:
            got = f"a forward in which {self._seen} attention layers used transformers' registry"
            expected = f"one call of each of its {self._depth} layers"
            raise ModelError(field, got, expected, f"Its attention code is not supported. {FIX}")
        if layer not in self._calls:
            fix = "Open the block with these layers."
            raise ModelError(field, f"layer {layer}", f"one of the chosen layers {list(self.layers)}", fix)
        call = self._calls[layer]
        unsupported = [name for name in UNSUPPORTED if call.settings.get(name) is not None]
        if unsupported:
            raise ModelError(field, f"attention with {unsupported[0]}", "plain softmax attention", FIX)
        return call

    def _weights(self, layer: int, rows: Tensor) -> Tensor:
        if rows.dim() == 1:
            return self._weights(layer, rows[:, None])[:, 0]
        call = self._call(layer)
        step = self._step(call, len(rows))
        return torch.cat([self._chunk(layer, call, part) for part in rows.split(step, dim=1)], dim=1)

    def _step(self, call: Call, batch: int) -> int:
        return max(1, CHUNK_ELEMENTS // max(1, batch * call.query.shape[1] * call.key.shape[2]))

    def _chunk(self, layer: int, call: Call, rows: Tensor) -> Tensor:
        weights = softmax_rows(call, rows)
        if layer not in self._checked:  # once a layer: do these weights reproduce the layer's output?
            gap = output_gap(call, rows, weights)
            if gap > 1.0:
                got = f"weights whose values differ from layer {layer}'s own output ({gap:.1f} times the rounding)"
                fix = f"Its attention does more than q·k, mask, bias and softmax. {FIX}"
                raise ModelError(f"attention_row({self._name})", got, "the layer's own weights", fix)
            self._checked.add(layer)
        return weights

    def _through(self, layer: int, row: Tensor) -> Tensor:
        """Return row·A (B,K), A the layer's head mean, using only the rows of A where `row` (B,K) is not 0."""
        call, out = self._call(layer), torch.zeros_like(row)
        used = (row != 0).any(dim=0).nonzero().squeeze(1)
        for part in used.split(self._step(call, len(row))):
            weights = self._chunk(layer, call, part.expand(len(row), -1)).mean(dim=2)
            out += (row[:, None, part] @ weights).squeeze(1)
        return out


class attention_row:  # a context manager, named like a function as torch.no_grad is
    """Context manager: `with attention_row(model) as tap: model(...)`, then `tap.weights(rows)` at any time.

    Exactly one forward of `model` may run in the block. The registry is restored on exit.

    Args:
        model: a decoder or encoder of transformers, with or without a head and adapters.
        layers: "last" (ABC's), "all", a layer's number or several; −1 is the last. Only these layers' q, k and v
            are kept in memory.

    Raises:
        ConfigError: `layers` is none of these.
        ModelError: a layer number beyond the model's, or a model that has both an encoder and a decoder.
    """

    def __init__(self, model: nn.Module, layers: Layers = "last") -> None:
        self._model = model
        self._tap = AttentionTap(model, layers)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> AttentionTap:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self._registry = ALL_ATTENTION_FUNCTIONS
        self._name = _implementation(self._model)
        self._before = self._registry._local_mapping.get(self._name)
        self._registry[self._name] = _wrapped(self._registry.get(self._name), self._tap)
        self._handles = [
            self._model.register_forward_pre_hook(self._tap._begin),
            self._model.register_forward_hook(self._tap._end, always_call=True),
        ]
        for layer in bloom.layers(self._model):
            self._handles += bloom.capture(layer, self._tap._record)
        return self._tap

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        if self._before is None:
            del self._registry[self._name]
        else:
            self._registry[self._name] = self._before


def resolve_layers(layers: Layers, depth: int, name: str) -> tuple[int, ...]:
    """Return layer numbers from 0, in order, of a model of `depth` layers. Raises ModelError for one out of range."""
    layers = check_layers("attention_row.layers", layers)
    if layers == "all":
        return tuple(range(depth))
    numbers: Iterable[int] = (-1,) if isinstance(layers, str) else layers
    for number in numbers:
        if not -depth <= number < depth:
            expected = f"a layer of {name}, which has {depth}: 0 to {depth - 1}, or −1 to −{depth} from the end"
            raise ModelError("layers", number, expected, "Choose another layer.")
    return tuple(sorted({number % depth for number in numbers}))


def needed_layers(specs: Iterable[AttentionSpec]) -> str | tuple[int, ...]:
    """Return the layers that one block must capture for all of `specs`."""
    specs = list(specs)
    if any(spec.rollout or spec.layers == "all" for spec in specs):
        return "all"
    return tuple(n for spec in specs for n in ((-1,) if isinstance(spec.layers, str) else spec.layers))


def _name(model: nn.Module) -> str:
    base: Any = model
    return plain_class(bare(base)).__name__


def _depth(model: nn.Module, name: str) -> int:
    """Return the model's number of layers. Raises ModelError for a model that is not one stack of self-attention."""
    config = _text_config(model)
    depth = getattr(config, "num_hidden_layers", None)
    if depth is None or getattr(config, "is_encoder_decoder", False):
        got = "a configuration without num_hidden_layers" if depth is None else "an encoder with a decoder"
        raise ModelError(f"attention_row({name})", got, "one stack of self-attention layers", FIX)
    return int(depth)


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _implementation(model: nn.Module) -> str:
    """Return the attention implementation that the model's text layers use, such as "sdpa" or "eager"."""
    return _text_config(model)._attn_implementation or "eager"


def _wrapped(inner: Callable[..., Any] | None, tap: AttentionTap) -> Callable[..., Any]:
    """Return the attention function `inner` (None: the eager one of the module's own file), recorded by `tap`."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        function = inner or _eager(module)
        result = function(module, query, key, value, attention_mask, *args, **kwargs)
        inputs = query.detach(), key.detach(), value.detach()
        tap._record(Call(module, *inputs, attention_mask, kwargs, result[0].detach()))
        return result

    return attend


def _eager(module: nn.Module) -> Callable[..., Any]:
    """Return the eager attention of the file that defines the module's class or a class it inherits from."""
    for kind in type(module).__mro__:
        function: Callable[..., Any] | None = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    fix = "Load the model with attn_implementation='sdpa'."
    raise ModelError("attention_row", type(module).__name__, "a file with eager_attention_forward", fix)
