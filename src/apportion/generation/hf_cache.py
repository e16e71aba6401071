"""Adapters of the batch's key-value cache to transformers' cache classes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from apportion.generation.key_values import KeyValueBuffers, ModelCache, Pair


class BufferLayer(CacheLayerMixin):
    """One layer of `KeyValueBuffers` as a transformers cache: `update` writes the new column and returns views.

    A sliding window is applied by the mask, which the models build from the columns.
    """

    is_sliding = False

    def __init__(self, buffers: KeyValueBuffers, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.buffers, self.index, self.is_initialized = buffers, index, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the buffers are allocated."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Write keys and values (B,H,1,D) to the newest column; return all columns (B,H,L,D) as views."""
        used = self.buffers.used
        keys, values = (buffer[: self.buffers.rows, :, :used] for buffer in self.buffers.layers[self.index])
        keys[:, :, -1:], values[:, :, -1:] = key_states, value_states
        return keys, values

    def get_seq_length(self) -> int:
        """Return the number of columns before the newest, which is being computed."""
        return self.buffers.used - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (columns, offset) for the models' masks."""
        return self.buffers.used - 1 + query_length, 0

    def get_max_length(self) -> int:
        """Return −1: the buffers grow."""
        return -1


def empty_past(model: Any, rows: int, longest: int) -> KeyValueBuffers | ModelCache:
    """Return an empty cache for `model`: buffers where every layer caches the keys and values of all or of a window."""
    kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    chunked = "chunked_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ())
    plain = kinds <= {"DynamicLayer", "DynamicSlidingWindowLayer"} and not chunked
    return KeyValueBuffers(rows, longest) if plain else ModelCache()


def cache_over(buffers: KeyValueBuffers) -> Cache:
    """Return the transformers cache through which a model writes one column to `buffers` a step."""
    return Cache([BufferLayer(buffers, i) for i in range(len(buffers.layers))])


def empty_cache(model: Any, past: KeyValueBuffers | ModelCache) -> Cache:
    """Return the transformers cache for the prefill: with buffers, one that keeps every column."""
    return DynamicCache() if isinstance(past, KeyValueBuffers) else DynamicCache(config=model.config)
