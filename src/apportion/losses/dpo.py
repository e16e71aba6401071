"""Direct preference optimisation: the loss of pairs from the log-probabilities of policy and reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from apportion.errors import ConfigError, DataError, check_number, unknown_name
from apportion.losses._ratios import upcast

KINDS = ("sigmoid", "ipo")


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return (sum of the pairs' losses, number of pairs), both () scalars; their quotient is the mean loss.

    With h = (log π − log π_ref)(chosen) − (log π − log π_ref)(rejected), the loss of a pair is

    - "sigmoid": −(1−ε)·log σ(βh) − ε·log σ(−βh), the Bradley–Terry likelihood of a label that is wrong with
      probability ε.
    - "ipo": (1−ε)·(h − 1/2β)² + ε·(h + 1/2β)². With log-probabilities summed over tokens h grows with the length;
      TRL, and `apportion dpo`, divide those of each answer by its number of tokens first.

    Args:
        policy_chosen: (N,) log-probabilities of the chosen answers under the policy, in nats, summed over their tokens.
        policy_rejected: (N,) those of the rejected answers.
        reference_chosen: (N,) those of the chosen answers under the reference; it gets no gradient.
        reference_rejected: (N,) those of the rejected answers under the reference.
        beta: β > 0, how strongly the policy is held to the reference.
        label_smoothing: ε in [0, 0.5).

    Raises:
        ConfigError: an unknown `kind`, `beta` or `label_smoothing` outside its range.
        DataError: shapes that differ, or are not (N,).

    Sources: Rafailov et al. 2023 (arXiv 2305.18290) eq. 7; Azar et al. 2023 (arXiv 2310.12036) eq. 17; label smoothing
    as in Mitchell 2023, "A note on DPO with noisy preferences".
    """
    if kind not in KINDS:
        raise unknown_name("dpo.kind", str(kind), KINDS)
    if check_number("dpo.beta", beta, 0.0, "0.1 is usual.") == 0.0:
        raise ConfigError("dpo.beta", beta, "a finite number > 0", "0.1 is usual.")
    epsilon = check_number("dpo.label_smoothing", label_smoothing, 0.0, "0 trusts every label.", most=0.5)
    if epsilon == 0.5:
        raise ConfigError("dpo.label_smoothing", label_smoothing, "less than 0.5", "At 0.5 labels say nothing.")
    given = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    shapes = [tuple(x.shape) for x in given]
    if len(set(shapes)) > 1 or policy_chosen.dim() != 1:
        fix = "Give one log-probability an answer, in the order of the pairs."
        raise DataError("log-probabilities", shapes, "four tensors (N,) of one length", fix)
    chosen, rejected, ref_chosen, ref_rejected = (upcast(x) for x in given)
    margin = (chosen - ref_chosen.detach()) - (rejected - ref_rejected.detach())  # h
    if kind == "ipo":
        target = 1.0 / (2.0 * beta)
        losses = (1.0 - epsilon) * (margin - target) ** 2 + epsilon * (margin + target) ** 2
    else:
        losses = -(1.0 - epsilon) * logsigmoid(beta * margin) - epsilon * logsigmoid(-beta * margin)
    return losses.sum(), torch.tensor(float(len(margin)), device=margin.device)
