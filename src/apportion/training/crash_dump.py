"""What a run that was stopped leaves behind: the rollouts at hand, all that is known of them, and any traceback."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.batching import micro_batches, trim
from apportion.distributed import collectives
from apportion.losses._ratios import LIMIT
from apportion.models.policy import Policy
from apportion.stages.rl.rollout_log import DECIMALS
from apportion.training.run_folder import explained
from apportion.types import Rollouts


def place(folder: Path, step: int) -> Path:
    """Return where the rollouts of a stopped step lie: FOLDER/stopped/step-N, with the process's number where there
    are several and this is not the main one."""
    name = f"step-{step}" if collectives.is_main() else f"step-{step}-process-{collectives.rank()}"
    return folder / "stopped" / name


def save(
    target: Path, rows: str, error: BaseException, cause: BaseException | None, metrics: Mapping[str, float]
) -> Path:
    """Write rollouts.jsonl (`rows`), error.txt, and metrics.json and traceback.txt (of `cause`) where there is
    something to say in them, to the folder `target`; return it. Raises DiskError."""
    with explained(target):
        target.mkdir(parents=True, exist_ok=True)
        (target / "rollouts.jsonl").write_text(rows, encoding="utf-8", errors="backslashreplace")
        (target / "error.txt").write_text(f"{error}\n", encoding="utf-8", errors="backslashreplace")
        if metrics:
            plain = {name: _plain(value) for name, value in metrics.items()}
            (target / "metrics.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        if cause is not None:
            text = "".join(traceback.format_exception(cause))
            (target / "traceback.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
    return target


def lines(
    tokenizer: Any,
    step: int,
    rollouts: Rollouts,
    columns: Mapping[str, Tensor],
    skipped: Sequence[int] = (),
    *,
    split: bool = True,
) -> str:
    """Return every rollout as a JSON line in the form of rollouts.jsonl, as far as it is known.

    Args:
        columns: further tensors (B,T) by name, as lists over the sampled tokens.
        skipped: rows of updates that were skipped, marked `skipped`.
        split: decode each token alone as well, which takes a millisecond for some tens of tokens.

    A number that is not finite is the text "NaN", "Infinity" or "-Infinity".
    """
    found = {"logprob": rollouts.logprobs, "old_logprob": rollouts.old_logprobs, **columns}
    rows = [record(tokenizer, step, rollouts, row, found, split) for row in range(len(rollouts))]
    rows = [row | ({"skipped": number in skipped} if skipped else {}) for number, row in enumerate(rows)]
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def record(
    tokenizer: Any,
    step: int,
    rollouts: Rollouts,
    row: int,
    columns: Mapping[str, Tensor],
    split: bool,
) -> dict[str, Any]:
    """Return what is known of rollout `row`."""
    mask = rollouts.mask[row]
    ids, prompt = rollouts.response_ids[row][mask], rollouts.prompt_ids[row][rollouts.prompt_mask[row]]
    raw = rollouts.evidence.get("raw_scores")
    numbers = {"score": rollouts.scores, "raw_score": raw}
    return {
        "step": step,
        "row": row,
        "prompt": tokenizer.decode(prompt),
        "text": tokenizer.decode(ids),
        **({"tokens": [tokenizer.decode([i]) for i in ids.tolist()]} if split else {}),
        "prompt_ids": prompt.tolist(),
        "response_ids": ids.tolist(),
        "group": int(rollouts.group[row]),
        "ended": None if rollouts.ended is None else bool(rollouts.ended[row]),
        **{name: _plain(float(given[row])) for name, given in numbers.items() if given is not None},
        **{name: [_plain(v) for v in given[row][mask].float().tolist()] for name, given in columns.items()},
    }


def _plain(value: float) -> float | str:
    if math.isfinite(value):
        return round(value, DECIMALS)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


@torch.no_grad()
def ratios(policy: Policy, rollouts: Rollouts, rows: int, tokens: int) -> Tensor:
    """Return π/π_old of each token (B,T) with the policy as it is now, log-ratios cut to ±20; 1 off the mask.

    One forward of the policy, in micro-batches of at most `rows` rows and `tokens` positions.
    """
    out = torch.ones(rollouts.mask.shape, device=rollouts.mask.device)
    everyone = torch.arange(len(rollouts), device=rollouts.mask.device)
    for part in micro_batches(rollouts, everyone, rows, tokens):
        batch = trim(rollouts.select(part))
        now = policy.forward(batch, values=False, entropy=False).logprobs.float()
        gap = torch.where(batch.mask, now - batch.old_logprobs.float(), 0.0)
        out[part, : batch.mask.shape[1]] = gap.clamp(-LIMIT, LIMIT).exp()
    return out
