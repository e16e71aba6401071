"""Paired differences over seeds of likelihood and reward, and whether PPO-ptx does what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.reward_curves import interval, shown

MEASURES = ("nll", "reward", "kl")


def compared(parts: Mapping[str, Mapping[str, Any]], start: float) -> dict[str, Any]:
    """Return the paired differences PPO-ptx − PPO over the seeds that both have, with Student's intervals.

    Args:
        parts: {"ppo 0": {"nll", "reward", "kl"}, "ptx 0": ..., ...}. start: the nll before training.

    `passed` is whether the likelihood's interval lies below 0 and the reward's holds 0; False with one seed.
    """
    seeds = sorted(int(name.split()[1]) for name in parts if name.startswith("ptx ") and f"ppo {name[4:]}" in parts)
    found: dict[str, Any] = {"seeds": seeds, "start": {"nll": start}}
    for name in MEASURES:
        pairs = [(parts[f"ppo {seed}"][name], parts[f"ptx {seed}"][name]) for seed in seeds]
        found[name] = interval([b - a for a, b in pairs])
    text, reward = found["nll"], found["reward"]
    known = text["high"] is not None and reward["high"] is not None
    lower = known and text["high"] < 0
    return found | {"passed": bool(lower and reward["low"] <= 0 <= reward["high"])}


def table(parts: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any]) -> str:
    """Return every run and the differences for a reader."""
    lines = [f"start: NLL {found['start']['nll']:.3f} nats a token"]
    for name, part in sorted(parts.items(), key=lambda one: (int(one[0].split()[1]), one[0])):
        side, seed = name.split()
        values = f"NLL {part['nll']:.3f}, reward of the last batches {part['reward']:+.3f}, KL {part['kl']:.2f}"
        lines.append(f"seed {seed}, {'PPO-ptx' if side == 'ptx' else 'PPO':7}: {values}")
    lines += [f"PPO-ptx − PPO, {name}: {shown(found[name], 3)}" for name in MEASURES]
    verdict = "lower NLL, no difference of reward shown" if found["passed"] else "not shown: lower NLL at equal reward"
    return "\n".join([*lines, verdict])
