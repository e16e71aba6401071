"""Rate of the update beside the machine's matmul rate, and the numerical effect of its optimisations.

    python -m benchmarks.update_speed [--rows 64] [--prompt 16] [--response 112] [--repeats 3] [--json]

One optimizer step over rows of random tokens: all weights with a critic's head, and adapters with a critic's head.
Operations are the necessary ones: for every linear weight of n numbers 2n a token forward, 2n for the input's
gradient and 2n for its own where it is trained; the output layer only at response tokens; without
attention's products. Recomputation, norms, softmax and the optimizer count as zero operations; their time is included.

The loss of a fixed batch is also computed in float32 with every shortcut off (whole logits, whole rows, autograd's own
norms and linear layers, no micro-batches) and on, and in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn

from apportion import Rollouts, losses
from apportion.config import LoraConfig, OptimConfig, PPOConfig, RLConfig, SamplingConfig
from apportion.models.fast.linear import FlatLinear
from apportion.models.fast.norms import FAST
from apportion.models.policy import Policy
from apportion.stages.rl.models import make_policy
from apportion.stages.rl.update import Targets, update
from apportion.system import cpu
from apportion.training.optimizer import make_optimizer
from benchmarks.harness.machine import SIZES, describe, matmul_rate


def main() -> int:
    """Measure and print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="the policy's start: a built-in name or a folder")
    for name, value in {"rows": 64, "prompt": 16, "response": 112, "repeats": 3, "micro_tokens": 1024}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--matmul_sizes", type=int, nargs="+", default=SIZES, help="of the machine's rate")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    threads = cpu.configure_threads(options.threads).count
    cpu.set_threads(threads)
    cpu.keep_freed_memory()
    result: dict[str, Any] = {"machine": describe(), "threads": threads, "rows": options.rows}
    result |= {"prompt": options.prompt, "response": options.response, "settings": {}}
    for name, rank in (("all weights", 0), ("adapters", 16)):
        result["settings"][name] = rate(load(options, rank, "bfloat16"), options)
    result["numbers"] = numbers(options)
    print(json.dumps(result) if options.json else table(result))
    return 0


def load(options: argparse.Namespace, rank: int, dtype: str) -> Policy:
    """Return the policy as a run would load it."""
    longest = SamplingConfig(max_new_tokens=options.response, prompt_tokens=[options.prompt, options.prompt])
    settings = RLConfig(policy=options.model, dtype=dtype, lora=LoraConfig(rank=rank), sampling=longest)
    policy = make_policy(settings)
    assert policy.value_head is not None
    nn.init.normal_(policy.value_head.weight, std=0.01, generator=torch.Generator().manual_seed(1))
    return policy


def batch_of(policy: Policy, rows: int, prompt: int, response: int) -> tuple[Rollouts, Targets]:
    """Return random rollouts with old log-probabilities near the policy's, and random targets."""
    generator = torch.Generator().manual_seed(0)
    size = int(policy.model.get_output_embeddings().weight.shape[0])
    ids = torch.randint(5, size - 5, (rows, prompt + response), generator=generator)
    noise = torch.randn(4, rows, response, generator=generator)
    mask = torch.ones(rows, response, dtype=torch.bool)
    sampled = Rollouts(
        prompt_ids=ids[:, :prompt],
        prompt_mask=torch.ones(rows, prompt, dtype=torch.bool),
        response_ids=ids[:, prompt:],
        mask=mask,
        logprobs=torch.zeros(rows, response),
        group=torch.arange(rows),
    )
    with torch.no_grad():
        parts = [policy.forward(sampled.select(r)).logprobs for r in torch.arange(rows).split(8)]
    logprobs = torch.cat(parts) + 0.05 * noise[0]
    rollouts = Rollouts(
        **{**vars(sampled), "logprobs": logprobs, "old_logprobs": logprobs, "evidence": {"values": noise[3]}}
    )
    segments = torch.arange(response).expand(rows, -1)
    return rollouts, Targets(1.0 + noise[1], noise[2], mask, mask, segments)


def rate(policy: Policy, options: argparse.Namespace) -> dict[str, float]:
    """Return seconds and operations of one update, and its rate over the matmul rate measured around it."""
    rollouts, targets = batch_of(policy, options.rows, options.prompt, options.response)
    optimizer = make_optimizer(policy.trainable(), policy.remainders, OptimConfig(lr=1e-6))
    times, peaks = [], []
    for _ in range(options.repeats + 1):
        peaks.append(matmul_rate(torch.bfloat16, sizes=options.matmul_sizes))
        began = time.perf_counter()
        run(policy, optimizer, rollouts, targets, options.micro_tokens)
        times.append(time.perf_counter() - began)
    seconds, peak = statistics.median(times[1:]), statistics.median(peaks)
    count = operations(policy, options.rows, options.prompt, options.response)
    return {"seconds": seconds, "operations": count, "rate": count / seconds, "matmul_rate": peak} | {
        "ratio": count / seconds / peak,
        "least": count / max(times[1:]) / peak,
        "most": count / min(times[1:]) / peak,
    }


def run(policy: Policy, optimizer: Any, rollouts: Rollouts, targets: Targets, tokens: int) -> dict[str, float]:
    """Run one update of one optimizer step and return its metrics."""
    settings = PPOConfig(epochs=1, mini_batch=len(rollouts), micro_batch=len(rollouts), micro_tokens=tokens)
    generator = torch.Generator().manual_seed(0)
    return update(policy, optimizer, losses.ppo(), rollouts, targets, settings, OptimConfig(), generator)


def operations(policy: Policy, rows: int, prompt: int, response: int) -> float:
    """Return the necessary operations of one update, without attention's products."""
    head = policy.model.get_output_embeddings()
    total = 0.0
    for module in policy.model.modules():
        if not isinstance(module, nn.Linear):
            continue
        tokens = rows * (response if module is head else prompt + response)
        total += tokens * module.weight.numel() * (6 if module.weight.requires_grad else 4)
    return total


def numbers(options: argparse.Namespace) -> dict[str, float]:
    """Return a fixed batch's float32 loss without shortcuts, and the relative differences of the other ways."""
    exact = load(options, 0, "float32")
    rollouts, targets = batch_of(exact, min(options.rows, 8), options.prompt, options.response)
    quick = loss_of(exact, rollouts, targets, options.micro_tokens // 4)
    plain = loss_of(without_shortcuts(exact), rollouts, targets, 1 << 30)
    low = loss_of(load(options, 0, "bfloat16"), rollouts, targets, options.micro_tokens)
    return {"loss": plain, "shortcuts": abs(quick - plain) / abs(plain), "bfloat16": abs(low - plain) / abs(plain)}


def loss_of(policy: Policy, rollouts: Rollouts, targets: Targets, tokens: int) -> float:
    """Return policy and value loss of one update."""
    optimizer = make_optimizer(policy.trainable(), policy.remainders, OptimConfig(lr=1e-12))
    metrics = run(policy, optimizer, rollouts, targets, tokens)
    return metrics["loss/policy"] + metrics["loss/value"]


def without_shortcuts(policy: Policy) -> Policy:
    """Return a copy whose layers are the library's own, with whole logits and whole rows."""
    other = copy.deepcopy(policy)
    other.plain = other.shares = False
    for module in other.model.modules():
        if isinstance(module, FlatLinear):
            module.__class__ = nn.Linear
        elif type(module) in FAST.values():
            module.__class__ = type(module).__bases__[1]
    return other


def table(result: dict[str, Any]) -> str:
    """Return the figures as text."""
    lines = [
        f"{result['rows']} sequences of {result['prompt'] + result['response']} tokens, {result['threads']} threads"
    ]
    for name, f in result["settings"].items():
        lines.append(
            f"{name:12} {f['seconds']:6.2f} s  {f['operations'] / 1e12:5.2f} TFLOP  {f['rate'] / 1e9:5.0f} of "
            f"{f['matmul_rate'] / 1e9:.0f} GFLOP/s  {f['ratio']:.1%} [{f['least']:.1%}, {f['most']:.1%}]"
        )
    n = result["numbers"]
    lines.append(f"loss {n['loss']:.6f}: shortcuts change it by {n['shortcuts']:.1e}, bfloat16 by {n['bfloat16']:.1e}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
