"""Run in a process of its own, with TRL 1.12.0 on its path: one batch of its real PPOTrainer, watched.

Writes what its functions held, at two places of its loop, to the file named on the command line: after it has computed
advantages, and at each backward. Nothing of TRL's is replaced: its `empty_cache` and `accelerator.backward` are
wrapped, read their caller's variables and continue.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tiny
import tiny_runs
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

BATCH = [
    "queries",
    "responses",
    "logprobs",
    "ref_logprobs",
    "values",
    "scores",
    "rewards",
    "advantages",
    "returns",
    "padding_mask",
    "padding_mask_p1",
    "sequence_lengths",
]
STEP = [
    "micro_batch_inds",
    "new_logprobs",
    "vpred",
    "mb_advantage",
    "mb_logprobs",
    "mb_return",
    "mb_values",
    "pg_loss",
    "vf_loss",
    "loss",
]


def kept(frame: Any, names: list[str]) -> dict[str, torch.Tensor]:
    """Return copies of those variables of a frame."""
    return {n: torch.as_tensor(frame.f_locals[n]).detach().clone() for n in names}


def monitor(trainer: PPOTrainer) -> dict[str, Any]:
    """Return a record that fills while `trainer` trains."""
    record: dict[str, Any] = {"steps": []}
    empty_cache, backward = ppo_trainer.empty_cache, trainer.accelerator.backward

    def on_empty_cache() -> None:
        frame = sys._getframe(1)
        if "batch" not in record and "advantages" in frame.f_locals and "returns" in frame.f_locals:
            record["batch"] = kept(frame, BATCH)
        empty_cache()

    def on_backward(loss: torch.Tensor, **more: Any) -> None:
        frame = sys._getframe(1)
        found = kept(frame, STEP)
        inputs = [frame.f_locals[n] for n in ("new_logprobs", "vpred")]
        found["policy_grad"], found["value_grad"] = torch.autograd.grad(loss, inputs, retain_graph=True)
        record["steps"].append(found)
        backward(loss, **more)

    ppo_trainer.empty_cache, trainer.accelerator.backward = on_empty_cache, on_backward
    return record


def make(folder: Path, accumulate: int) -> PPOTrainer:
    """Return a trainer of tiny random models that often write EOS and never the pad token; a batch is 8 rows."""
    policy = AutoModelForCausalLM.from_config(tiny.config(0))
    tiny_runs.make_likely(policy, tiny_runs.EOS, 3.5)
    tiny_runs.make_likely(policy, tiny_runs.PAD, -9.0)
    reference = AutoModelForCausalLM.from_config(tiny.config(0))
    tiny_runs.make_likely(reference, tiny_runs.PAD, -9.0)
    judge, value = (AutoModelForSequenceClassification.from_config(tiny.config(s, num_labels=1)) for s in (1, 2))
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "left"
    prompts = [{"input_ids": row} for row in tiny_runs.prompts(8)]
    settings = PPOConfig(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=8 // accumulate,
        gradient_accumulation_steps=accumulate,
        num_mini_batches=1,
        num_ppo_epochs=3,
        total_episodes=8,
        response_length=9,
        stop_token="eos",
        temperature=1.0,
        learning_rate=3e-3,
        kl_coef=0.2,
        gamma=0.97,
        lam=0.9,
        cliprange=0.15,
        cliprange_value=0.1,
        vf_coef=0.3,
        num_sample_generations=0,
        save_strategy="no",
        seed=3,
    )
    return PPOTrainer(
        args=settings,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=judge,
        value_model=value,
        train_dataset=Dataset.from_list(prompts),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    target, accumulate = Path(sys.argv[1]), int(sys.argv[2])
    trainer = make(target.parent / "run", accumulate)
    record = monitor(trainer)
    trainer.train()
    record["log"] = {k: v for k, v in trainer.state.log_history[-1].items() if isinstance(v, (int, float))}
    torch.save(record, target)
