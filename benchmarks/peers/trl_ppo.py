"""Run in a process of its own, with TRL 1.12.0 first on its path: its PPOTrainer on a benchmark's work.

TRL's code is unchanged: its `batch_generation`, `get_reward` and `forward` are wrapped, timed and counted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from apportion.algorithms import KL
from benchmarks.harness.recorder import Recorder, read_work
from benchmarks.harness.settings import Work
from benchmarks.peers.common import BatchEnd, common_settings, prompts_of, tokenizer_of, weights_dtype


def make(work: Work) -> PPOTrainer:
    """Return TRL's trainer for the work; pad and EOS are never sampled, so that every response has full length."""
    tokenizer, dtype = tokenizer_of(work), weights_dtype(work)
    policy, reference = (AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype) for _ in range(2))
    judge, value = (AutoModelForSequenceClassification.from_pretrained(work.reward, dtype=dtype) for _ in range(2))
    for model in (policy, reference, judge, value):
        model.config.pad_token_id = tokenizer.pad_token_id
    policy.generation_config.suppress_tokens = [tokenizer.pad_token_id, tokenizer.eos_token_id]
    # its accumulation spans mini-batches: with several of them, each must be one pass
    whole = work.batch if work.micro_batch == work.mini_batch else work.micro_batch
    settings = PPOConfig(
        **common_settings(work),
        num_mini_batches=work.batch // work.mini_batch,
        num_ppo_epochs=work.epochs,
        per_device_train_batch_size=whole,
        gradient_accumulation_steps=work.batch // whole,
        local_rollout_forward_batch_size=work.batch,
        total_episodes=work.batch * work.total,
        response_length=work.new_tokens,
        num_sample_generations=0,
        kl_coef=KL["kl_penalty"]["coef"],  # our initial coefficient
    )
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in prompts_of(work)]
    return PPOTrainer(
        args=settings,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=judge,
        value_model=value,
        train_dataset=Dataset.from_list(rows),
    )


def monitor(recorder: Recorder, trainer: PPOTrainer, work: Work) -> None:
    """Time TRL's phases and count its work."""
    pad = trainer.processing_class.pad_token_id

    def generated(result: Any, model: Any, queries: Tensor, *args: Any) -> None:
        responses = result[0][:, queries.shape[1] :]
        distinct = len({tuple(row) for row in queries.tolist()})
        recorder.generated([[i for i in row if i != pad] for row in responses.tolist()])
        tokens = int((queries != pad).sum())
        recorder.add(prompts=distinct, prompt_tokens=tokens, generated_tokens=int((responses != pad).sum()))

    recorder.wrap(ppo_trainer, "batch_generation", "generate", generated)

    def judged(result: Any, model: Any, *args: Any) -> None:
        if model is trainer.reward_model:  # values come from the same function
            recorder.scored(result[1])

    recorder.wrap(ppo_trainer, "get_reward", "score", judged)
    forward = ppo_trainer.forward

    def phased(model: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if model is trainer.ref_model:
            recorder.enter("reference")
            try:
                return forward(model, ids, *args, **kwargs)
            finally:
                recorder.leave()
        recorder.open("update")  # the first forward of the policy itself
        recorder.add(trained_tokens=int((ids[:, -work.new_tokens :] != pad).sum()))
        return forward(model, ids, *args, **kwargs)

    ppo_trainer.forward = phased


def main() -> int:
    """Train, measure, write."""
    work = read_work()
    trainer = make(work)
    recorder = Recorder(work)
    monitor(recorder, trainer, work)
    trainer.add_callback(BatchEnd(recorder, 1))  # its callbacks are called once a batch
    trainer.train()
    kl = [row["objective/kl"] for row in trainer.state.log_history if "objective/kl" in row][work.warmup :]
    recorder.save(kl=kl[: work.batches], peer=str(Path(sys.modules["trl"].__file__ or "").parent.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
