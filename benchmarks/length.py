"""Time per token of each phase of a PPO batch as responses grow, with attention's part measured and subtracted.

    python -m benchmarks.length                                # SmolLM2-135M, 4 rows of 128, 512 and 2,048 tokens
    python -m benchmarks.length --shapes 16x128 4x512 1x2048   # the same number of tokens a batch, fewer rows
    python -m benchmarks.length --json

The number of rows is constant by default: decoding one token reads all weights once for any number of rows, so that one
long row costs more a token than sixteen short ones in any implementation.

Attention's part: every call of the attention function in the measured batch is recorded with its shapes, mask and
settings (transformers' registry is wrapped). Each kind of call is then timed separately on random tensors of those
shapes, with its backward pass where the batch had one, and multiplied by its count. Decoding has a kind for every
number of keys: some are timed, the others interpolated. "apart" is the phase without it. The operations are counted
from the shapes: 4·H·D for each pair of a query and a visible key, three times that with the backward pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from apportion.cli.main import quiet_libraries
from apportion.config import PPOConfig, RLConfig, SamplingConfig, ScoreConfig
from apportion.generation import llama
from apportion.generation.step_model import extra_padding
from apportion.models.attention.row import _eager
from apportion.stages.method import build_method
from apportion.stages.rl.learner import Learner, make_learner
from apportion.stages.rl.train import train_batch
from apportion.system import cpu
from apportion.training.session import TrainingSession
from benchmarks.harness.measuring import reward_model, write_prompts

SHAPES = [(4, 128), (4, 512), (4, 2048)]  # rows, tokens
PROMPT = 8  # tokens of every prompt
PHASES = ("generate", "score", "update")
KNOTS = 9  # numbers of keys at which decoding's attention is timed
SECONDS, REPEATS = 0.3, 30  # limits of repeating one kind of call


class Kind(NamedTuple):
    """The properties of an attention call that determine its time."""

    phase: str
    query: tuple[int, ...]  # (B,H,Q,D)
    key: tuple[int, ...]  # (B,KV,K,D)
    value: tuple[int, ...]
    dtype: torch.dtype
    mask: tuple[int, ...] | None
    implementation: str


@dataclass
class Calls:
    """The attention calls of a batch: the count of each kind, and a function that repeats one."""

    counts: Counter[Kind] = field(default_factory=Counter)
    repeat: dict[Kind, Callable[..., Any]] = field(default_factory=dict)

    def record(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count one call of `function` by its kind."""
        module, query, key, value, mask, *rest = args
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else None
        shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
        kind = Kind(phase_of(query, key), *shapes, query.dtype, shape, name)
        self.counts[kind] += 1
        if kind not in self.repeat:
            self.repeat[kind] = lambda q, k, v: function(module, q, k, v, mask, *rest, **kwargs)[0]


def phase_of(query: torch.Tensor, key: torch.Tensor) -> str:
    """Return the phase that a call belongs to: only the update needs gradients, only decoding grows by a token.

    Where one micro-batch is the batch, the update begins with the policy's forward of scoring: timed there, its
    attention counts to the update.
    """
    if query.requires_grad:
        return "update"
    return "generate" if query.shape[2] == 1 or key.shape[2] <= PROMPT + extra_padding(query.device) else "score"


@contextmanager
def recorded(calls: Calls) -> Iterator[None]:
    """Record every attention call of the block in `calls`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as REGISTRY

    before = dict(REGISTRY._local_mapping)

    def wrapped(name: str) -> Callable[..., Any]:
        inner = REGISTRY.get(name)

        def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
            function = inner or _eager(module)
            calls.record(name, function, (module, *args), kwargs)
            return function(module, *args, **kwargs)

        return attend

    decode = llama.attend

    def decoding(query: Any, keys: Any, values: Any, bias: Any, scaling: float) -> Any:
        def repeat(module: Any, q: Any, k: Any, v: Any, mask: Any) -> tuple[Any]:
            return (decode(q[:, :, 0], k, v, mask, scaling),)

        calls.record("decode", repeat, (None, query[:, :, None], keys, values, bias), {})
        return decode(query, keys, values, bias, scaling)

    for name in ("sdpa", "eager"):
        REGISTRY[name] = wrapped(name)
    llama.attend = decoding  # the Llama decoding step calls no registry
    try:
        yield
    finally:
        llama.attend = decode
        REGISTRY._local_mapping.clear()
        REGISTRY._local_mapping.update(before)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table or JSON, and return 0."""
    options = parse(arguments)
    quiet_libraries()
    threads = cpu.configure_threads(options.threads).count
    with tempfile.TemporaryDirectory() as folder:
        reward = reward_model(options.model, Path(folder) / "reward")
        prompts = write_prompts(Path(folder) / "prompts.jsonl")
        longest = max(length for _, length in options.shapes)
        rows = []
        for count, length in options.shapes:
            config = settings(options, count, length, str(reward), str(prompts), folder)
            rows.append(measure(config, batches_of(options, length, longest)))
    result = {
        "model": options.model,
        "threads": threads,
        "torch": torch.__version__,
        "epochs": options.epochs,
        "lengths": rows,
        "ratio": ratios(rows),
    }
    sys.stdout.write(json.dumps(result) + "\n" if options.json else table(result))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="policy, and base of the reward model")
    parser.add_argument(
        "--shapes", type=shape, nargs="+", default=[(4, 128), (4, 512), (4, 2048)], help="rows x tokens"
    )
    parser.add_argument("--batches", type=int, default=None, help="of each shape; 1 of the longest, up to 3 by default")
    parser.add_argument("--epochs", type=int, default=1, help="passes over a batch")
    parser.add_argument("--micro_tokens", type=int, default=2048, help="response tokens a forward and backward pass")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="the policy's")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def shape(text: str) -> tuple[int, int]:
    """Return (rows, tokens) of "4x128"."""
    rows, _, tokens = text.partition("x")
    return int(rows), int(tokens)


def batches_of(options: argparse.Namespace, length: int, longest: int) -> int:
    """Return how many batches of this length to measure."""
    return options.batches or max(1, min(3, longest // (2 * length)))


def settings(options: argparse.Namespace, rows: int, length: int, reward: str, prompts: str, folder: str) -> RLConfig:
    """Return a run of ABC with `rows` responses of `length` tokens a batch, in micro-batches of constant size."""
    micro_batch = max(1, min(rows, options.micro_tokens // length))
    return RLConfig(
        algorithm="abc",
        policy=options.model,
        reward_model=reward,
        prompts=prompts,
        output=f"{folder}/run",
        steps=10_000,
        log_rollouts=0,
        compare=[],
        dtype=options.dtype,
        sampling=SamplingConfig(batch_size=rows, max_new_tokens=length, prompt_tokens=[PROMPT, PROMPT]),
        scores=ScoreConfig(micro_batch=micro_batch),
        ppo=PPOConfig(epochs=options.epochs, mini_batch=rows, micro_batch=micro_batch),
    )


def measure(config: RLConfig, batches: int) -> dict[str, Any]:
    """Return one shape's seconds by phase, with and without attention, a batch and a token."""
    learner = make_learner(config, build_method(config))
    warm_up(learner, config)
    calls, times = Calls(), []
    for step in range(1, batches + 1):
        with recorded(calls):
            times.append(one_batch(learner, config, step))
    tokens = config.sampling.batch_size * config.sampling.max_new_tokens
    phases = {}
    for phase in PHASES:
        total = statistics.median(t[phase] for t in times)
        phases[phase] = phase_figures(calls, phase, total, batches, tokens)
    sums = {key: sum(p[key] for p in phases.values()) for key in ("s", "attention_s", "attention_operations")}
    phases["batch"] = per_token(sums, tokens)
    return {"rows": config.sampling.batch_size, "tokens": config.sampling.max_new_tokens, "batches": batches, **phases}


def warm_up(learner: Learner, config: RLConfig) -> None:
    """Run one batch of short responses, so that the first measured one includes no one-time cost."""
    length, config.sampling.max_new_tokens = config.sampling.max_new_tokens, 4
    one_batch(learner, config, 1)
    config.sampling.max_new_tokens = length


def one_batch(learner: Learner, config: RLConfig, step: int) -> dict[str, float]:
    """Sample, score and learn from one batch as `train` does, and return the seconds of each phase."""
    session, began = TrainingSession(), time.perf_counter()
    train_batch(session, learner, config, step)
    times = {name: session.clock[name] for name in ("generate", "score")}
    return times | {"update": time.perf_counter() - began - sum(times.values())}


def phase_figures(calls: Calls, phase: str, total: float, batches: int, tokens: int) -> dict[str, float]:
    """Return the seconds and operations of one phase, a batch, and attention's share of them.

    Raises:
        RuntimeError: no attention call was seen in the phase, so that its part is unknown.
    """
    counts = {kind: count / batches for kind, count in calls.counts.items() if kind.phase == phase}
    if not counts:
        raise RuntimeError(f"length: no attention call was seen in phase {phase}; transformers' registry is not used")
    seconds = seconds_of(calls, list(counts))
    result = {
        "s": total,
        "attention_s": sum(seconds[kind] * count for kind, count in counts.items()),
        "attention_operations": sum(operations(kind) * count for kind, count in counts.items()),
    }
    return per_token(result, tokens)


def per_token(result: dict[str, float], tokens: int) -> dict[str, float]:
    """Return the figures with milliseconds a token, with and without attention."""
    apart = result["s"] - result["attention_s"]
    return {**result, "apart_s": apart, "token_ms": result["s"] / tokens * 1e3, "token_apart_ms": apart / tokens * 1e3}


def operations(kind: Kind) -> float:
    """Return the multiplications and additions of q·k and weights·v over the pairs of a causal mask."""
    batch, heads, queries, size = kind.query
    keys = kind.key[2]
    pairs = queries * (keys - (queries - 1) / 2)
    return 4.0 * batch * heads * size * pairs * (3 if kind.phase == "update" else 1)


def seconds_of(calls: Calls, kinds: list[Kind]) -> dict[Kind, float]:
    """Return the seconds of one call of each kind, decoding's timed at `KNOTS` numbers of keys and interpolated."""
    one = sorted((k for k in kinds if k.query[2] == 1), key=lambda k: k.key[2])
    result = {kind: seconds_of_one(calls, kind) for kind in kinds if kind.query[2] != 1}
    if len(one) <= KNOTS:
        return result | {kind: seconds_of_one(calls, kind) for kind in one}
    knots = [one[round(i * (len(one) - 1) / (KNOTS - 1))] for i in range(KNOTS)]
    at, timed = [k.key[2] for k in knots], [seconds_of_one(calls, k) for k in knots]
    return result | {kind: interpolated(kind.key[2], at, timed) for kind in one}


def interpolated(x: int, at: list[int], values: list[float]) -> float:
    """Return the value at `x` on straight lines between the points; `x` lies within them."""
    right = next(i for i, point in enumerate(at) if point >= x)
    if right == 0:
        return values[0]
    part = (x - at[right - 1]) / (at[right] - at[right - 1])
    return values[right - 1] + part * (values[right] - values[right - 1])


def seconds_of_one(calls: Calls, kind: Kind) -> float:
    """Return the median seconds of one call on random tensors, with its backward pass in the update."""
    train = kind.phase == "update"
    shapes = (kind.query, kind.key, kind.value)
    tensors = [torch.randn(s, dtype=torch.float32).to(kind.dtype).requires_grad_(train) for s in shapes]

    def run() -> None:
        with torch.set_grad_enabled(train):
            out = calls.repeat[kind](*tensors)
        if train:
            torch.autograd.grad(out, tensors, torch.ones_like(out))

    run()
    times: list[float] = []
    while len(times) < 2 or (sum(times) < SECONDS and len(times) < REPEATS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the longest's time a token over the shortest's, by phase: raw, and apart from attention."""
    short, long = (f(rows, key=lambda row: row["tokens"]) for f in (min, max))
    return {
        name: {
            how: long[name][key] / short[name][key] for how, key in (("raw", "token_ms"), ("apart", "token_apart_ms"))
        }
        for name in (*PHASES, "batch")
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as text, a line a phase and length."""
    head = f"{result['model']}, {result['threads']} threads, {result['epochs']} epochs, torch {result['torch']}"
    lines = [
        head,
        f"{'':12}{'phase':10} {'seconds':>9} {'attention':>10} {'its GFLOP':>10} {'ms/token':>9} {'apart':>8}",
    ]
    for row in result["lengths"]:
        for place, name in enumerate((*PHASES, "batch")):
            which, phase = f"{row['rows']} × {row['tokens']}" if place == 0 else "", row[name]
            counted = phase["attention_operations"] / 1e9
            lines.append(
                f"{which:12}{name:10} {phase['s']:>9.3f} {phase['attention_s']:>10.3f} {counted:>10.4g} "
                f"{phase['token_ms']:>9.3f} {phase['token_apart_ms']:>8.3f}"
            )
    short, long = (f(row["tokens"] for row in result["lengths"]) for f in (min, max))
    lines.append(f"time a token at {long} over {short}, raw and apart from attention:")
    lines += [f"{'':12}{name:10} {r['raw']:>9.2f} {r['apart']:>10.2f}" for name, r in result["ratio"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
