"""Cost of ABC over sparse credit in a whole PPO batch: operations, time, and memory as responses grow.

    python -m benchmarks.abc_batch                 # SmolLM2-135M and a reward model made from it, a few minutes
    python -m benchmarks.abc_batch --json

Both credits train the same policy alternately, through the code of `apportion rl`; their batches differ only in the
credit. "added" is the work of an ABC batch that a sparse one lacks, timed separately on that batch: wrapping the
registry and recording in every layer of the scoring forward, the softmax row, its head mean, its normalisation, its
redistribution and its statistics, minus the corresponding work of sparse credit. "paired" is the difference of whole
batches, "null" that between two batches with sparse credit in the same rounds: an error of null is an error of paired.
Memory is the peak of torch's allocator in a scoring forward with the attention row minus one without; the alternative,
`output_attentions=True` with eager attention, is measured as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from apportion import credit
from apportion.cli.main import quiet_libraries
from apportion.config import PPOConfig, RLConfig, SamplingConfig
from apportion.credit import AttentionSpec
from apportion.evidence.scoring import score
from apportion.models.attention.row import attention_row
from apportion.models.reward import RewardModel
from apportion.stages.method import build_method
from apportion.stages.rl.learner import Learner, make_learner
from apportion.stages.rl.sources import FixedSource
from apportion.stages.rl.train import train_batch
from apportion.system import cpu
from apportion.training.session import TrainingSession
from apportion.types import Method, Rollouts
from benchmarks.harness.measuring import (
    difference,
    fitted,
    peak_bytes,
    reward_model,
    rounds,
    seconds,
    spread,
    write_prompts,
)

CREDITS = {"sparse": "sparse", "abc": "attention"}
PROMPT = 8  # tokens of every prompt: batches of one size


class Bench(NamedTuple):
    """A learner, its settings, and the two methods that it alternates between."""

    learner: Learner
    config: RLConfig
    methods: dict[str, Method]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table or JSON, and return 0."""
    options = parse(arguments)
    quiet_libraries()
    threads = cpu.configure_threads(options.threads).count
    with tempfile.TemporaryDirectory() as folder:
        bench = build(options, Path(folder))
        result = {
            "model": options.model,
            "threads": threads,
            "torch": torch.__version__,
            "batch": [options.rows, options.new_tokens],
            "epochs": bench.config.ppo.epochs,
            **whole_batches(bench, options),
            "memory": memory(bench.learner.models.reward, options),
        }
    sys.stdout.write(json.dumps(result) + "\n" if options.json else table(result))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="policy, and base of the reward model")
    parser.add_argument("--rows", type=int, default=16, help="rollouts a batch")
    parser.add_argument("--new_tokens", type=int, default=24, help="tokens a response")
    parser.add_argument("--epochs", type=int, default=None, help="passes over a batch; default: the algorithm's")
    parser.add_argument("--pairs", type=int, default=5, help="rounds of three batches: sparse, ABC, sparse")
    parser.add_argument("--repetitions", type=int, default=20, help="of the added part, in every round")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048], help="for memory")
    parser.add_argument("--limit_gb", type=float, default=4.0, help="memory limit of an output_attentions forward, GB")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="the policy's")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def with_credit(config: RLConfig, name: str) -> RLConfig:
    """Return the settings with another credit method, followed by the KL penalty."""
    return config.model_copy(update={"credit": [name, "kl_penalty"]})


def build(options: argparse.Namespace, folder: Path) -> Bench:
    """Return learner and methods, with a reward model and prompts written to `folder`."""
    config = RLConfig(
        policy=options.model,
        reward_model=str(reward_model(options.model, folder / "reward")),
        prompts=str(write_prompts(folder / "prompts.jsonl")),
        output=str(folder / "run"),
        steps=10_000,
        log_rollouts=0,
        compare=[],
        dtype=options.dtype,
        sampling=SamplingConfig(
            batch_size=options.rows, max_new_tokens=options.new_tokens, prompt_tokens=[PROMPT, PROMPT]
        ),
        ppo=PPOConfig(epochs=options.epochs),
    )
    methods = {name: build_method(with_credit(config, which)) for name, which in CREDITS.items()}
    build_method(config)  # resolves the algorithm's defaults
    return Bench(make_learner(config, methods["abc"]), config, methods)


def select_credit(bench: Bench, name: str) -> None:
    """Select credit `name` for the learner's next batch."""
    method = bench.methods[name]
    bench.learner.method, bench.learner.credit_state = method, method.credit.init()
    bench.learner.needed = method.needs | {"reference_logprobs"}


def one_batch(bench: Bench, name: str, step: int = 1) -> Rollouts:
    """Sample, score and learn from one batch as `train` does, and return its scored rollouts."""
    select_credit(bench, name)
    learner, source = bench.learner, bench.learner.source
    rollouts = score(learner.models, source.take(step), learner.needs, bench.config.scores, learner.base_evidence)
    learner.source = FixedSource(rollouts)
    train_batch(TrainingSession(), learner, bench.config, step)
    learner.source = source
    return rollouts


def whole_batches(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Return times and operations of whole batches, and of ABC's part of them."""
    flop = {}
    for name in CREDITS:  # warms up as well
        with FlopCounterMode(display=False) as counter:
            rollouts = one_batch(bench, name)
        flop[name] = counter.get_total_flops()
    sparse, abc, again, added = [], [], [], []
    for _ in range(options.pairs):
        (s, a, n) = rounds([lambda which=w: one_batch(bench, which) for w in ("sparse", "abc", "sparse")], 1)
        sparse, abc, again = sparse + s, abc + a, again + n
        added.append(added_seconds(bench, rollouts, options.repetitions))
    total = statistics.median(sparse + again)
    ratios = [one / two for one, two in zip(added, abc, strict=True)]
    row = row_operations(bench.learner.models.reward, rollouts)
    return {
        "batch_s": spread(sparse + again),
        "abc_batch_s": spread(abc),
        "added_s": spread(added),
        "added_ratio": spread(ratios),
        "pairs": options.pairs,
        **difference("paired", sparse, abc, total),
        **difference("null", sparse, again, total),
        "operations": {**flop, "added_counted": flop["abc"] - flop["sparse"], "added_analytic": row},
        "operations_ratio": row / flop["sparse"],
    }


def row_operations(reward: RewardModel, rollouts: Rollouts) -> int:
    """Return the multiplications and additions of one row a rollout, O(H·T·d): q·k, and weights·v, which checks it."""
    config = reward.model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    length = rollouts.prompt_ids.shape[1] + rollouts.response_ids.shape[1]
    return len(rollouts) * config.num_attention_heads * length * size * 2 * 2


def added_seconds(bench: Bench, rollouts: Rollouts, repetitions: int) -> float:
    """Return the median seconds of an ABC batch's own work, minus the corresponding work of sparse credit."""
    parts = reward_inputs(rollouts).split(bench.config.scores.micro_batch)
    reading = sum(statistics.median(reading_seconds(bench.learner.models.reward, p, repetitions)) for p in parts)
    after = {}
    for name in ("sparse", "abc"):
        select_credit(bench, name)
        after[name] = statistics.median(
            seconds(lambda: assign_credit(bench.learner, rollouts)) for _ in range(repetitions)
        )
    return reading + after["abc"] - after["sparse"]


def reward_inputs(rollouts: Rollouts) -> Tensor:
    """Return the input ids (B,P+T) of the reward model; prompts and responses have one length each."""
    return torch.cat([rollouts.prompt_ids, rollouts.response_ids], dim=1)


def assign_credit(learner: Learner, rollouts: Rollouts) -> None:
    """Compute the rewards and the controllers' statistics, as a batch does after scoring."""
    rewards, learner.credit_state = credit.apply(learner.method.credit, rollouts, learner.credit_state)
    learner.update_controllers(rollouts, rewards)


@torch.no_grad()
def reading_seconds(reward: RewardModel, ids: Tensor, repetitions: int) -> list[float]:
    """Return the seconds of each repetition of the row's work without the forward, on the q, k and v of a real one."""
    rows = torch.full((len(ids),), ids.shape[1] - 1)
    with attention_row(reward.model) as tap:
        reward.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    call, layers = tap._calls[tap.layers[-1]], tap._depth
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        with attention_row(reward.model) as tap:
            tap._begin(reward.model, ())
            for _ in range(layers):
                tap._record(call)
            tap._end(reward.model, (), None)
        tap.attention(AttentionSpec(), rows)
        times.append(time.perf_counter() - began)
    return times


def memory(reward: RewardModel, options: argparse.Namespace) -> dict[str, Any]:
    """Return bytes and seconds at every length of one sequence: plain scoring, with the row, with output_attentions."""
    rows = [at_length(reward, length, options.limit_gb * 1e9) for length in options.lengths]
    fits = {}
    for name in ("abc", "output_attentions"):
        known = [row for row in rows if f"{name}_added_bytes" in row]
        if len(known) >= 3:
            fits[name] = fitted([r["tokens"] for r in known], [r[f"{name}_added_bytes"] for r in known])
    return {"lengths": rows, "fit": fits}


@torch.no_grad()
def at_length(reward: RewardModel, length: int, limit: float) -> dict[str, Any]:
    """Return one length's figures; output_attentions is skipped, with the reason, where it needs too much memory."""
    vocabulary = reward.model.config.get_text_config().vocab_size
    ids = torch.randint(2, vocabulary, (1, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids, dtype=torch.bool)
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: reward.forward(ids, mask, []),
        "abc": lambda: reward.forward(ids, mask, [AttentionSpec()]),
    }
    result: dict[str, Any] = {"tokens": length, **measured(ways)}
    config = reward.model.config.get_text_config()
    needs = (config.num_hidden_layers + 2) * config.num_attention_heads * length**2 * reward.model.dtype.itemsize
    if needs > limit:
        reason = f"needs {needs / 1e9:.1f} GB for its T×T matrices, more than {limit / 1e9:g} GB"
        return result | {"output_attentions_skipped": reason}
    before = config._attn_implementation
    reward.model.set_attn_implementation("eager")
    try:
        result |= measured({"output_attentions": lambda: eager_row(reward, ids)})
    finally:
        reward.model.set_attn_implementation(before)
    result["output_attentions_added_bytes"] = result["output_attentions_bytes"] - result["plain_bytes"]
    return result


def measured(ways: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Return each way's peak bytes and median seconds of three interleaved calls, and ABC's added bytes."""
    result: dict[str, Any] = {}
    for name, way in ways.items():
        way()  # warm up
        with peak_bytes() as peak:
            way()
        result[f"{name}_bytes"] = peak[0]
    times = rounds(list(ways.values()), 3)
    result |= {f"{name}_s": statistics.median(t) for name, t in zip(ways, times, strict=True)}
    return result | ({"abc_added_bytes": result["abc_bytes"] - result["plain_bytes"]} if "abc" in ways else {})


def eager_row(reward: RewardModel, ids: Tensor) -> Tensor:
    """Return α as the paper's code computes it: from all layers' (H,T,T) matrices, the last row of the last one."""
    out = reward.model(input_ids=ids, attention_mask=torch.ones_like(ids), output_attentions=True)
    return out.attentions[-1][:, :, -1].mean(dim=1)


def table(result: dict[str, Any]) -> str:
    """Return the figures as text."""
    rows, tokens = result["batch"]
    batch, added, ratio = result["batch_s"], result["added_s"], result["added_ratio"]
    operations = result["operations"]
    lines = [
        f"{result['model']}, {rows} × {tokens} tokens, {result['epochs']} epochs, {result['threads']} threads, torch "
        f"{result['torch']}",
        f"batch, sparse      {batch['median']:8.3f} s [{batch['min']:.3f}, {batch['max']:.3f}]",
        f"ABC adds           {added['median'] * 1e3:8.3f} ms [{added['min'] * 1e3:.3f}, {added['max'] * 1e3:.3f}]",
        f"of a whole batch   {ratio['median']:8.4%} [{ratio['min']:.4%}, {ratio['max']:.4%}]",
        f"paired             {interval(result, 'paired')}   null {interval(result, 'null')} (95%)",
        f"operations         {operations['sparse']:.4g} counted; ABC adds {operations['added_counted']:.4g} counted, "
        f"{operations['added_analytic']:.4g} analytic ({result['operations_ratio']:.2e} of them)",
        "",
        f"{'tokens':>7} {'plain':>10} {'ABC adds':>12} {'output_attentions adds':>24} {'plain, s':>9} {'ABC':>7} eager",
    ]
    for row in result["memory"]["lengths"]:
        eager = row.get("output_attentions_added_bytes")
        added_by = row.get("output_attentions_skipped", "") if eager is None else f"{eager / 1e6:,.1f} MB"
        slow = f"{row['output_attentions_s']:.3f}" if eager is not None else "–"
        lines.append(
            f"{row['tokens']:>7} {row['plain_bytes'] / 1e6:>7.1f} MB {row['abc_added_bytes'] / 1e3:>9,.1f} kB "
            f"{added_by:>24} {row['plain_s']:>9.3f} {row['abc_s']:>7.3f} {slow}"
        )
    for name, fit in result["memory"]["fit"].items():
        lines.append(
            f"{name}: {fit['per_token']:,.1f} bytes a token, {fit['per_square']:.4g} bytes a token squared "
            f"({fit['square_share']:.2%} of the growth at the longest)"
        )
    return "\n".join(lines) + "\n"


def interval(result: dict[str, Any], name: str) -> str:
    """Return a ratio with its interval."""
    return f"{result[f'{name}_ratio']:+.2%} [{result[f'{name}_ratio_low']:+.2%}, {result[f'{name}_ratio_high']:+.2%}]"


if __name__ == "__main__":
    sys.exit(main())
