"""Every policy loss as a slow loop over rows, tokens and actions, in float64: the reference of the tests."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_term(ratio: Tensor, adv: float, low: float, high: float) -> Tensor:
    """Return −min(ρ·A, clip(ρ)·A) of scalars."""
    limited = min(max(ratio, torch.tensor(1.0 - low).double()), torch.tensor(1.0 + high).double())
    return -min(ratio * adv, limited * adv)


def sg(x: Tensor) -> Tensor:
    return x.detach()


def slow(name: str, new: Tensor, old: Tensor, reference: Tensor, adv: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
    """Return the loss of `LOSSES[name]` already divided, by loops over rows, tokens and actions."""
    total, tokens, actions, rows = torch.zeros((), dtype=torch.float64), 0, 0, 0
    for row in range(len(mask)):
        on = [t for t in range(mask.shape[1]) if mask[row, t]]
        if not on:
            continue
        rows, tokens, n = rows + 1, tokens + len(on), len(on)
        actions += len({int(ids[row, t]) for t in on})
        rho = {t: torch.exp(new[row, t] - old[row, t]) for t in on}
        a = {t: float(adv[row, t]) for t in on}
        gap = {t: reference[row, t] - new[row, t] for t in on}
        mean_ratio = torch.exp(sum(new[row, t] - old[row, t] for t in on) / n)
        if name == "ppo(action)":
            for k in {int(ids[row, t]) for t in on}:
                own = [t for t in on if ids[row, t] == k]
                ratio = torch.exp(sum(new[row, t] - old[row, t] for t in own))
                total = total + clip_term(ratio, sum(a[t] for t in own) / len(own), 0.2, 0.2)
        elif name in ("gspo", "gspo(wide)"):
            low, high = (3e-4, 4e-4) if name == "gspo" else (0.1, 0.2)
            total = total + clip_term(mean_ratio, sum(a.values()) / n, low, high)
        for t in on:
            if name == "ppo":
                total = total + clip_term(rho[t], a[t], 0.2, 0.2)
            elif name in ("grpo", "grpo(kl)", "dr_grpo", "dr_grpo(kl, length)"):
                kl = (torch.exp(gap[t]) - gap[t] - 1) * (0.3 if "kl" in name else 0.0)
                total = total + (clip_term(rho[t], a[t], 0.2, 0.2) + kl) / (1 if "dr" in name else n)
            elif name.startswith("dapo"):
                total = total + clip_term(rho[t], a[t], *((0.2, 0.28) if name == "dapo" else (0.1, 0.5)))
            elif name == "gspo(token)":
                ratio = sg(mean_ratio) * torch.exp(new[row, t]) / sg(torch.exp(new[row, t]))
                total = total + clip_term(ratio, a[t], 0.1, 0.2) / n
            elif name.startswith("cispo"):
                low, high = (1.0, 4.0) if name == "cispo" else (0.3, 0.2)
                total = total - min(max(float(rho[t]), 1 - low), 1 + high) * a[t] * new[row, t]
            elif name == "reinforce":
                total = total - a[t] * new[row, t]
    counts = {"grpo": rows, "grpo(kl)": rows, "dr_grpo": rows, "dr_grpo(kl, length)": 7 * rows, "ppo(action)": actions}
    return total / (rows if name.startswith("gspo") else counts.get(name, tokens))
