"""The negative log-likelihood of held-out texts under a policy, by plain transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from apportion.config import RLConfig
from apportion.models.loading import locate
from apportion.stages.rl.learner import read_mix_of
from apportion.stages.rl.mix import Encoded


def held_out_rows(policy: str, texts: Path, tokens: int) -> list[Encoded]:
    """Return the texts as PPO-ptx learns such: with an end token behind each, and cut to `tokens`.

    Raises:
        DataError: as a run with them as its mix.
    """
    config = RLConfig(policy=policy)
    config.ppo.ptx_coef, config.ppo.ptx_data, config.ppo.ptx_tokens = 1.0, str(texts), tokens
    mix = read_mix_of(config)
    assert mix is not None
    return mix.rows


@torch.no_grad()
def nll(model: Any, rows: Sequence[Encoded], batch: int = 4) -> float:
    """Return the mean negative log-likelihood, nats a token, over all tokens of `rows` that are trained."""
    total, tokens = 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row.prompt) + len(row.completion))
    for first in range(0, len(ordered), batch):
        chosen = ordered[first : first + batch]
        whole = [[*row.prompt, *row.completion] for row in chosen]
        counted = [[*[False] * len(row.prompt), *row.trained] for row in chosen]
        width = max(map(len, whole))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in whole])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole])
        trained = torch.tensor([[*row, *[False] * (width - len(row))] for row in counted])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        losses = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        total += float(losses[trained[:, 1:]].double().sum())
        tokens += int(trained[:, 1:].sum())
    return total / tokens


def nll_of(folder: str | Path, rows: Sequence[Encoded]) -> float:
    """Return `nll` of the language model in a folder, or of a built-in name, in float32."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(locate("--policy", str(folder)), dtype=torch.float32)
    return nll(model.eval(), rows)
