"""Run in a process of its own, with TRL 1.16.0 first on its path: its GRPOTrainer or RLOOTrainer on a benchmark's work.

TRL's code is unchanged: methods of the trainer are wrapped, timed and counted. The reward model is passed to TRL as a
model, so that TRL calls it in its own way.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from benchmarks.harness.recorder import Recorder, read_work
from benchmarks.harness.settings import Work
from benchmarks.peers.common import BatchEnd, common_settings, prompts_of, tokenizer_of, weights_dtype

BETA = {"grpo": 0.04, "rloo": 0.05}  # both sides evaluate a reference model


def make(work: Work) -> Any:
    """Return TRL's trainer for the work; pad and EOS are never sampled, so that every response has full length."""
    tokenizer, dtype = tokenizer_of(work), weights_dtype(work)
    policy = AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype)
    judge = AutoModelForSequenceClassification.from_pretrained(work.reward, dtype=dtype)
    config, trainer = (GRPOConfig, GRPOTrainer) if work.algorithm == "grpo" else (RLOOConfig, RLOOTrainer)
    settings = config(
        **common_settings(work),
        beta=BETA[work.algorithm],
        num_generations=work.samples,
        num_iterations=work.epochs,
        per_device_train_batch_size=work.micro_batch,
        gradient_accumulation_steps=work.mini_batch // work.micro_batch,
        generation_batch_size=work.batch,
        max_completion_length=work.new_tokens,
        max_steps=work.total * work.steps,
        generation_kwargs={"suppress_tokens": [tokenizer.pad_token_id, tokenizer.eos_token_id]},
    )
    return trainer(
        model=policy,
        reward_funcs=judge,
        reward_processing_classes=AutoTokenizer.from_pretrained(work.reward),
        args=settings,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts_of(work)]),
    )


def monitor(recorder: Recorder, trainer: Any) -> None:
    """Time TRL's phases and count its work."""

    def generated(result: Any, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> None:
        responses = result[0] if isinstance(result, tuple) else result  # GRPO gives (ids, log-probabilities), RLOO ids
        recorder.add(
            prompts=len({tuple(row) for row in prompt_ids}),
            prompt_tokens=sum(map(len, prompt_ids)),
            generated_tokens=sum(map(len, responses)),
        )

    recorder.wrap(trainer, "_generate_single_turn", "generate", generated)
    recorder.wrap(trainer, "_calculate_rewards", "score")
    logps, prepare, loss = trainer._get_per_token_logps_and_entropies, trainer._prepare_inputs, trainer._compute_loss

    def phased(model: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.inside("update"):
            return logps(model, *args, **kwargs)
        recorder.enter("reference" if model is trainer.ref_model else "score")
        try:
            return logps(model, *args, **kwargs)
        finally:
            recorder.leave()

    def prepared(*args: Any, **kwargs: Any) -> Any:
        result = prepare(*args, **kwargs)
        recorder.open("update")  # all that follows, until the optimizer's last step of the batch
        return result

    def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        recorder.add(trained_tokens=int(inputs["completion_mask"].sum()))
        return loss(model, inputs, *args, **kwargs)

    trainer._get_per_token_logps_and_entropies = phased
    trainer._prepare_inputs, trainer._compute_loss = prepared, counted


def main() -> int:
    """Train, measure, write."""
    work = read_work()
    trainer = make(work)
    recorder = Recorder(work)
    monitor(recorder, trainer)
    trainer.add_callback(BatchEnd(recorder, work.steps))
    trainer.train()
    recorder.save(peer=str(Path(sys.modules["trl"].__file__ or "").parent.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
