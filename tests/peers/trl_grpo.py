"""Run in a process of its own, with one TRL release on its path: its own loss functions on given numbers.

`_compute_loss` of its trainers is called unbound, on an object that holds the settings it reads and the given
log-probabilities in place of a model's. Reads a list of cases from the first file named on the command line and writes
(loss, gradient of the log-probabilities) of each to the second.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def trainer_of(kind: str) -> Any:
    """Return the trainer class of a case: "grpo", "rloo", or "gspo_token" (an experiment of TRL 1.12)."""
    if kind == "rloo":
        from trl.trainer.rloo_trainer import RLOOTrainer

        return RLOOTrainer
    if kind == "gspo_token":
        from trl.experimental.gspo_token import GRPOTrainer as Experiment

        return Experiment
    from trl.trainer.grpo_trainer import GRPOTrainer

    return GRPOTrainer


def settings_of(case: dict[str, Any], logprobs: Tensor) -> SimpleNamespace:
    """Return what `_compute_loss` reads of its trainer, with TRL's defaults unless the case says otherwise."""
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
    )
    own = {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        "accelerator": accelerator,
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "aux_loss_enabled": False,
        "beta": 0.0,
        "current_gradient_accumulation_steps": 1,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "importance_sampling_level": "token",
        "loss_type": "grpo",
        "max_completion_length": 12,
        "model": SimpleNamespace(training=True),
        "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "_entropy_bonus_enabled": False,
        "_metrics": {"train": defaultdict(list)},
    }
    return SimpleNamespace(**own | case["settings"])


def run(case: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return (loss, its gradient, TRL's metrics) of one case."""
    mask = case["mask"].long()
    logprobs = case["logprobs"].clone().requires_grad_()
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1).long(),
        "prompt_mask": torch.ones(len(mask), 1).long(),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": case["advantages"],
        "old_per_token_logps": case["old_logprobs"],
        "ref_per_token_logps": case["reference_logprobs"],
        "old_logps": (case["old_logprobs"] * mask).sum(dim=1),
        "num_items_in_batch": mask.sum(),
    }
    owner = settings_of(case, logprobs)
    loss = trainer_of(case["kind"])._compute_loss(owner, None, inputs)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0], dict(owner._metrics["train"])


if __name__ == "__main__":
    torch.save([run(case) for case in torch.load(sys.argv[1])], sys.argv[2])
