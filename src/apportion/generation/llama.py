"""The decoding step of a Llama as few large products over packed weights, instead of the model's own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from apportion.distributed.sharding import plain_class
from apportion.generation.key_values import KeyValueBuffers, Pair
from apportion.generation.step_model import StepModel
from apportion.models.families import bare
from apportion.models.fast.linear import linear_parts
from apportion.models.fast.onednn import can_pack_to_sample, onednn_product, pack
from apportion.models.policy import Policy

Product = Callable[[Tensor], Tensor]


class Layer(NamedTuple):
    """The parts of one layer; `inputs` gives query, key and value together, `gate_up` gate and up."""

    norm: nn.Module
    inputs: Product
    output: Product
    middle_norm: nn.Module
    gate_up: Product
    down: Product
    activation: Callable[[Tensor], Tensor]


class LlamaStepModel(StepModel):
    """A `StepModel` with the decoding step of a Llama written out.

    The same operations as the model's eager attention, in about a third of the calls: query, key and value are one
    product, gate and up another; 16-bit weights are packed; attention of one query a row is two batched products over
    the buffers, without copies of shared key heads. Layers that are neither plain nor plainly adapted run their own
    `forward`.

    Args: as `StepModel`.
    """

    def __init__(self, policy: Policy, model: Any, rows: int, longest: int) -> None:
        super().__init__(policy, model, rows, longest)
        base = bare(model)
        trunk = base.model
        self.trunk = trunk
        self.heads = base.config.num_attention_heads
        self.groups = base.config.num_key_value_heads
        self.scaling = float(trunk.layers[0].self_attn.scaling)
        self.layers = [self._layer(layer) for layer in trunk.layers]
        self.head = product([base.lm_head])

    def _layer(self, layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return Layer(
            norm=layer.input_layernorm,
            inputs=product([attention.q_proj, attention.k_proj, attention.v_proj]),
            output=product([attention.o_proj]),
            middle_norm=layer.post_attention_layernorm,
            gate_up=product([mlp.gate_proj, mlp.up_proj]),
            down=product([mlp.down_proj]),
            activation=mlp.act_fn,
        )

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """See `StepModel.step`."""
        past = self.columns
        assert isinstance(past, KeyValueBuffers)
        past.next_column()
        states = self.trunk.embed_tokens(tokens)  # (n,d)
        cos, sin = self.trunk.rotary_emb(states[:, None], position_ids=positions[:, None])  # (n,1,size)
        half = sin.shape[-1] // 2
        turn = (cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1))
        hidden = ~past.seen[: past.rows]
        bias = torch.zeros(hidden.shape, dtype=past.layers[0][0].dtype, device=hidden.device)
        bias = bias.masked_fill_(hidden, -torch.inf)[:, None, None]  # (n,1,1,L)
        for layer, pair in zip(self.layers, past.layers, strict=True):
            states = layer.output(self._attend(layer.inputs(layer.norm(states)), turn, bias, pair)).add_(states)
            gate, up = layer.gate_up(layer.middle_norm(states)).chunk(2, dim=-1)
            states = layer.down(layer.activation(gate).mul_(up)).add_(states)
        return self.head(self.trunk.norm(states))

    def _attend(self, inputs: Tensor, turn: Pair, bias: Tensor, pair: Pair) -> Tensor:
        """Return the attention output (n,H·D) for projections (n,(H+2G)·D); keys and values are written to `pair`."""
        rows, groups, used = len(inputs), self.groups, self.columns.used  # type: ignore[union-attr]
        size = pair[0].shape[-1]
        heads = inputs.view(rows, -1, size)
        qk = heads[:, : self.heads + groups]
        qk = qk * turn[0] + qk.roll(size // 2, dims=-1) * turn[1]
        keys, values = pair[0][:rows], pair[1][:rows]  # (n,G,L,D), all columns: products would copy a view of some
        pair[0][:rows, :, used - 1] = qk[:, self.heads :]
        pair[1][:rows, :, used - 1] = heads[:, self.heads + groups :]
        return attend(qk[:, : self.heads].to(keys.dtype), keys, values, bias, self.scaling)


def attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Return the attention output of one query a row, (n,H·D), as eager attention computes it.

    Args:
        query: (n,H,D); keys, values: (n,G,L,D), each for H/G heads; bias: (n,1,1,L), −inf on masked keys.
    """
    rows, groups, _, size = keys.shape
    query = query.reshape(rows * groups, -1, size)
    scores = torch.bmm(query, keys.flatten(0, 1).transpose(1, 2)).unflatten(0, (rows, groups))
    scores = scores.mul_(scaling).add_(bias)  # (n,G,H/G,L), rounded as the model rounds
    weights = scores.softmax(dim=-1).flatten(0, 1)
    return torch.bmm(weights, values.flatten(0, 1)).view(rows, -1)


def is_llama(model: Any) -> bool:
    """Whether `model` is exactly transformers' Llama, in evaluation mode."""
    from transformers import LlamaForCausalLM

    base = bare(model)
    return plain_class(base) is LlamaForCausalLM and not model.training


def product(layers: list[nn.Module]) -> Product:
    """Return the function x -> the concatenated outputs of the layers.

    Plain linear layers are one product. Their adapters are two low-rank ones: x times every A, and that times every B
    in a block of its own. They are not merged: the sum, rounded to 16 bit, would lose most of their contribution.
    """
    parts = [linear_parts(layer) for layer in layers]
    linear = [part for part in parts if part is not None]
    if len(linear) < len(parts):
        return lambda x: torch.cat([layer(x) for layer in layers], dim=-1)
    weight = torch.cat([part.weight.detach() for part in linear]) if len(linear) > 1 else linear[0].weight.detach()
    biases = [part.bias.detach() for part in linear if part.bias is not None]
    base = plain_product(weight, torch.cat(biases).to(weight.dtype) if biases else None)
    if all(part.down is None for part in linear):
        return base
    empty = weight.new_zeros(0, weight.shape[1])
    downs = [empty if part.down is None else part.down.detach().to(weight.dtype) for part in linear]
    ups = [part.weight.new_zeros(len(part.weight), 0) if part.up is None else part.up.detach() for part in linear]
    down, up = torch.cat(downs).T, torch.block_diag(*ups).to(weight.dtype).T.contiguous()
    return lambda x: base(x).addmm_(x @ down, up)


def plain_product(weight: Tensor, bias: Tensor | None) -> Product:
    """Return the function x -> x·weightᵀ + bias, packed where supported."""
    if can_pack_to_sample(weight):
        packed = pack(weight)
        return lambda x: onednn_product(x, packed, bias)
    return lambda x: functional.linear(x, weight, bias)
