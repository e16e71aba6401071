"""Tiny random models of several architectures, with weights large enough that their attention is not flat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COMMON = {"vocab_size": 99, "pad_token_id": 0}
WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SHARED_KEYS = {"num_key_value_heads": 2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}),
    "llama (grouped queries)": ("LlamaConfig", WIDE | SHARED_KEYS),
    "mistral (window 4)": ("MistralConfig", WIDE | SHARED_KEYS | {"sliding_window": 4}),
    "qwen3 (q/k norm)": ("Qwen3Config", WIDE | SHARED_KEYS | {"head_dim": 8}),
    "gpt-neox": ("GPTNeoXConfig", WIDE),
    "opt": (
        "OPTConfig",
        {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    ),
    "bert": ("BertConfig", WIDE),
    "gemma2 (soft-cap, window 4)": (
        "Gemma2Config",
        WIDE | SHARED_KEYS | {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0},
    ),
    "gpt-oss (sinks)": (
        "GptOssConfig",
        WIDE | SHARED_KEYS | {"head_dim": 8, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}


def build(name: str, *, labels: int = 1, implementation: str = "sdpa", seed: int = 0) -> nn.Module:
    """Return a random sequence classifier of that architecture in float32, in evaluation mode."""
    import transformers

    kind, settings = CONFIGS[name]
    config = getattr(transformers, kind)(**COMMON | settings, num_labels=labels)
    factory = transformers.AutoModelForSequenceClassification
    model = factory.from_config(config, attn_implementation=implementation).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # norms' gains stay near 1: at 0.3 attention would be flat again
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter if parameter.dim() == 1 else 0.0))
    return model


@torch.no_grad()
def own_score(model: Any, ids: Sequence[int]) -> float:
    """Return the classifier's own score of one text, without any of our code."""
    given = {"input_ids": torch.tensor([list(ids)])}
    if "FNet" not in type(model).__name__:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    return float(model(**given).logits[0, 0])


def eager_copy(model: nn.Module, name: str, labels: int = 1) -> nn.Module:
    """Return the same weights with attention written out head by head, which can output its matrices."""
    copy = build(name, labels=labels, implementation="eager")
    copy.load_state_dict(model.state_dict())
    return copy


def batch(padding: str, length: int = 12, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Return (inputs of three rows, last real position of each) with `padding` "left", "right", "both" or "none"."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 99, (3, length), generator=generator)
    mask = torch.ones(3, length, dtype=torch.int64)
    if padding in ("left", "both"):
        mask[0, :4] = 0
        mask[2, :2] = 0
    if padding in ("right", "both"):
        mask[1, 9:] = 0
        mask[2, -1:] = 0
    ids = ids * mask
    last = (mask * torch.arange(length)).argmax(dim=1)
    return {"input_ids": ids, "attention_mask": mask}, last


def positions(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `inputs` with position ids that count real tokens, as left padding needs."""
    mask = inputs["attention_mask"]
    return inputs | {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


class Sizes(TorchDispatchMode):
    """Records (op, shape) of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = {leaf.untyped_storage().data_ptr() for leaf in given}
        for leaf in tree_leaves(out):  # a view allocates nothing
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in known:
                self.seen.append((str(func), tuple(leaf.shape)))
        return out
