"""Reading chosen rows of a model's last attention layer during its ordinary forward pass.

The attention function that the model uses is wrapped in transformers' registry for the length of a `with` block. It
receives q and k after rotary embedding and norms, the mask and the scaling, so one softmax row costs O(H·T·d); no
(T,T) matrix is made and `output_attentions` (which changes the kernel) is never used. Shapes: B rows of the batch,
R chosen positions, H heads, Q queries, K keys, D head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apportion.errors import ModelError, message

CHUNK_ELEMENTS = 1 << 24  # 64 MiB of float32 scores at a time
# keyword arguments that change the attention weights and that are not read here
UNREAD = ("position_bias",)


class Call(NamedTuple):
    """What one attention layer was given: query (B,H,Q,D), key (B,KV,K,D), its mask and its settings."""

    module: nn.Module
    query: Tensor
    key: Tensor
    mask: Tensor | None
    settings: dict[str, Any]


class AttentionTap:
    """Holds the last attention layer's inputs of one forward pass; `weights` turns them into rows on demand."""

    def __init__(self, model: nn.Module) -> None:
        self._name = type(model).__name__
        self._modules = set(model.modules())
        self._forwards = 0
        self._call: Call | None = None

    def _count(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._forwards += 1
        if self._forwards > 1:
            raise RuntimeError(
                f"attention_row: {self._name} ran a second forward in one `with` block; expected one. "
                "Open a new block for each forward, or the rows would belong to another batch."
            )

    def _record(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, settings: dict[str, Any]
    ) -> None:
        if module in self._modules:  # layers run in order, so the last call is the last layer's
            self._call = Call(module, query.detach(), key.detach(), mask, settings)

    def weights(self, rows: Tensor) -> Tensor:
        """Return post-softmax attention rows in float32, exactly 0 on keys that the row may not see.

        Args:
            rows: (B,) int64 query positions in the padded input, one a batch row, or (B,R) several.

        Returns:
            (B,H,K) for (B,), (B,R,H,K) for (B,R); columns are key positions, prompt and pads included. Detached.

        Raises:
            ModelError: no forward ran in the block, or this model's attention cannot be read from the registry.
        """
        call = self._call
        if call is None:
            raise ModelError(self._unread())
        if rows.dim() == 1:
            return self.weights(rows[:, None])[:, 0]
        unread = [name for name in UNREAD if call.settings.get(name) is not None]
        if unread:
            mend = "Use a credit that needs no attention (uniform, sparse) with this reward model."
            came = f"attention with {unread[0]}"
            raise ModelError(message(f"attention_row({self._name})", came, "plain softmax attention", mend))
        heads, keys = call.query.shape[1], call.key.shape[2]
        step = max(1, CHUNK_ELEMENTS // max(1, len(rows) * heads * keys))
        return torch.cat([_rows(call, part) for part in rows.split(step, dim=1)], dim=1)

    def _unread(self) -> str:
        came = "no forward pass" if self._forwards == 0 else "a forward whose attention never used the registry"
        mend = (
            "Call the model inside the `with` block; a model with attention code of its own (BLOOM, DeBERTa) "
            "cannot be read: use uniform or sparse credit with it."
        )
        return message(f"attention_row({self._name})", came, "one forward through transformers' attention", mend)

    @property
    def causal(self) -> bool:
        """Whether the tapped layer is causal (a decoder's). Raises ModelError before a forward."""
        if self._call is None:
            raise ModelError(self._unread())
        return _is_causal(self._call)


class attention_row:  # a context manager, named like a function as torch.no_grad is
    """Context manager: `with attention_row(model) as tap: model(...)`, then `tap.weights(rows)` at any time.

    Exactly one forward of `model` may run in the block. On any exit the registry is what it was.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tap = AttentionTap(model)

    def __enter__(self) -> AttentionTap:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self._registry = ALL_ATTENTION_FUNCTIONS
        self._name = _implementation(self._model)
        self._before = self._registry._local_mapping.get(self._name)
        self._registry[self._name] = _wrapped(self._registry.get(self._name), self._tap)
        self._hook = self._model.register_forward_pre_hook(self._tap._count)
        return self._tap

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()
        if self._before is None:
            del self._registry[self._name]
        else:
            self._registry[self._name] = self._before


def _implementation(model: nn.Module) -> str:
    """Return the attention implementation that the model's text layers use, such as "sdpa" or "eager"."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return config._attn_implementation or "eager"


def _wrapped(inner: Callable[..., Any] | None, tap: AttentionTap) -> Callable[..., Any]:
    """Return the attention function `inner` (None: the eager one of the module's own file) that also tells the tap."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        tap._record(module, query, key, attention_mask, kwargs)
        function = inner or sys.modules[type(module).__module__].eager_attention_forward
        return function(module, query, key, value, attention_mask, *args, **kwargs)

    return attend


def _is_causal(call: Call) -> bool:
    stated = call.settings.get("is_causal")
    return bool(getattr(call.module, "is_causal", True) if stated is None else stated)


def _rows(call: Call, rows: Tensor) -> Tensor:
    """Return softmax rows (B,R,H,K) float32 at query positions `rows` (B,R)."""
    batch, heads, _, size = call.query.shape
    kv_heads, keys = call.key.shape[1:3]
    index = rows[:, None, :, None].expand(-1, heads, -1, size)
    query = call.query.gather(2, index).float()  # (B,H,R,D)
    # head h reads key-value head h // (H / KV): group the heads rather than repeat the keys
    query = query.reshape(batch, kv_heads, -1, size)
    scaling = call.settings.get("scaling")
    scores = query @ call.key.float().transpose(2, 3) * (size**-0.5 if scaling is None else scaling)
    scores = scores.reshape(batch, heads, rows.shape[1], keys).transpose(1, 2)
    cap = call.settings.get("softcap")
    scores = scores if cap is None else torch.tanh(scores / cap) * cap
    visible, bias = _mask_rows(call, rows)
    scores = (scores if bias is None else scores + bias).masked_fill(~visible, -torch.inf)
    sinks = call.settings.get("s_aux")
    if sinks is not None:  # one more logit a head, which takes mass and is then dropped
        column = sinks.detach().float().reshape(1, 1, -1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    return scores.softmax(dim=-1).nan_to_num(0.0)  # a row that sees nothing has no mass


def _mask_rows(call: Call, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (which keys each row sees (B or 1,R,H or 1,K) bool, additive bias of that shape or None)."""
    keys, queries = call.key.shape[2], call.query.shape[2]
    mask = call.mask
    if mask is not None and not isinstance(mask, Tensor):
        mend = "Load the model with attn_implementation='sdpa'."
        raise ModelError(message("attention_row", type(mask).__name__, "a tensor mask or none", mend))
    if mask is not None and mask.dim() == 4:
        mask = mask[..., :keys].expand(len(rows), -1, queries, -1)
        index = rows[:, None, :, None].expand(-1, mask.shape[1], -1, keys)
        chosen = mask.gather(2, index).transpose(1, 2)  # (B,R,1 or H,K)
        if chosen.dtype == torch.bool:
            return chosen, None
        chosen = chosen.float()
        return chosen > torch.finfo(torch.float16).min, chosen
    columns = torch.arange(keys, device=rows.device)
    visible = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=rows.device)
    if _is_causal(call) and queries > 1:
        position = (rows + keys - queries)[..., None, None]
        visible = columns <= position
        window = call.settings.get("sliding_window")
        visible = visible if window is None else visible & (columns > position - window)
    return (visible, None) if mask is None else (visible & mask.bool()[:, None, None, :keys], None)
