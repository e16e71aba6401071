"""Time per token of each phase of a PPO batch as responses grow, with attention's own part measured and taken off.

    python benchmarks/length.py                                # SmolLM2-135M, 4 rows of 128, 512 and 2,048 tokens
    python benchmarks/length.py --shapes 16x128 4x512 1x2048   # as many tokens a batch, fewer rows
    python benchmarks/length.py --json

Rows are kept equal by default: decoding one token reads all weights once, for however many rows, so that one long row
costs more a token than sixteen short ones whatever the code does.

Attention's part: every call of the attention function in the measured batch is noted with its shapes, mask and
settings (transformers' registry is wrapped). Each kind of call is then timed alone on random tensors of those shapes,
with its backward pass where the batch had one, and multiplied by how often it came. Decoding has a kind for every
number of keys: some are timed, the others interpolated. "apart" is the phase less that. Beside it stand the operations
counted from the shapes: 4·H·D for each pair of a query and a key that it sees, three times that with the backward pass.
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
from measuring import reward_model, write_prompts

from apportion.cli.main import quiet_libraries
from apportion.config import PPOConfig, RLConfig, SamplingConfig, ScoreConfig
from apportion.generation import llama
from apportion.generation.step_model import extra_padding
from apportion.models.attention.row import _eager
from apportion.stages.rl.learner import Learner, make_learner
from apportion.stages.rl.method import build_method
from apportion.stages.rl.train import train_batch
from apportion.system import cpu
from apportion.training.session import TrainingSession

SHAPES = [(4, 128), (4, 512), (4, 2048)]  # rows, tokens
PROMPT = 8  # tokens of every prompt
PHASES = ("generate", "score", "update")
KNOTS = 9  # numbers of keys at which decoding's attention is timed
SECONDS, MOST = 0.3, 30  # of repeating one kind of call


class Kind(NamedTuple):
    """What makes two attention calls take the same time."""

    phase: str
    query: tuple[int, ...]  # (B,H,Q,D)
    key: tuple[int, ...]  # (B,KV,K,D)
    value: tuple[int, ...]
    dtype: torch.dtype
    mask: tuple[int, ...] | None
    implementation: str


@dataclass
class Book:
    """The attention calls of a batch: how often each kind came, and how to do one again."""

    counts: Counter[Kind] = field(default_factory=Counter)
    again: dict[Kind, Callable[..., Any]] = field(default_factory=dict)

    def note(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count one call of `function` by its kind."""
        module, query, key, value, mask, *rest = args
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else None
        shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
        kind = Kind(phase_of(query, key), *shapes, query.dtype, shape, name)
        self.counts[kind] += 1
        if kind not in self.again:
            self.again[kind] = lambda q, k, v: function(module, q, k, v, mask, *rest, **kwargs)[0]


def phase_of(query: torch.Tensor, key: torch.Tensor) -> str:
    """Return the phase that a call belongs to: only the update needs gradients, only decoding grows by a token."""
    if query.requires_grad:
        return "update"
    return "generate" if query.shape[2] == 1 or key.shape[2] <= PROMPT + extra_padding(query.device) else "score"


@contextmanager
def watched(book: Book) -> Iterator[None]:
    """Have every attention call inside noted in `book`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as REGISTRY

    before = dict(REGISTRY._local_mapping)

    def wrapped(name: str) -> Callable[..., Any]:
        inner = REGISTRY.get(name)

        def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
            function = inner or _eager(module)
            book.note(name, function, (module, *args), kwargs)
            return function(module, *args, **kwargs)

        return attend

    decode = llama.attend

    def decoding(query: Any, keys: Any, values: Any, bias: Any, scaling: float) -> Any:
        def again(module: Any, q: Any, k: Any, v: Any, mask: Any) -> tuple[Any]:
            return (decode(q[:, :, 0], k, v, mask, scaling),)

        book.note("decode", again, (None, query[:, :, None], keys, values, bias), {})
        return decode(query, keys, values, bias, scaling)

    for name in ("sdpa", "eager"):
        REGISTRY[name] = wrapped(name)
    llama.attend = decoding  # a Llama's steps are written out and use no registry
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
    found = {
        "model": options.model,
        "threads": threads,
        "torch": torch.__version__,
        "epochs": options.epochs,
        "lengths": rows,
        "ratio": ratios(rows),
    }
    sys.stdout.write(json.dumps(found) + "\n" if options.json else table(found))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="policy, and what the reward model is made from")
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
    """Return a run of ABC with `rows` responses of `length` tokens a batch, in parts of the same number of tokens."""
    part = max(1, min(rows, options.micro_tokens // length))
    return RLConfig(
        policy=options.model,
        reward_model=reward,
        prompts=prompts,
        output=f"{folder}/run",
        steps=10_000,
        log_rollouts=0,
        compare=[],
        dtype=options.dtype,
        sampling=SamplingConfig(batch_size=rows, max_new_tokens=length, prompt_tokens=[PROMPT, PROMPT]),
        scores=ScoreConfig(micro_batch=part),
        ppo=PPOConfig(epochs=options.epochs, mini_batch=rows, micro_batch=part),
    )


def measure(config: RLConfig, batches: int) -> dict[str, Any]:
    """Return one shape's seconds by phase, all of it and without attention, a batch and a token."""
    learner = make_learner(config, build_method(config))
    warm_up(learner, config)
    book, times = Book(), []
    for step in range(1, batches + 1):
        with watched(book):
            times.append(one_batch(learner, config, step))
    tokens = config.sampling.batch_size * config.sampling.max_new_tokens
    phases = {}
    for phase in PHASES:
        whole = statistics.median(t[phase] for t in times)
        phases[phase] = phase_figures(book, phase, whole, batches, tokens)
    total = {key: sum(p[key] for p in phases.values()) for key in ("s", "attention_s", "attention_operations")}
    phases["batch"] = per_token(total, tokens)
    return {"rows": config.sampling.batch_size, "tokens": config.sampling.max_new_tokens, "batches": batches, **phases}


def warm_up(learner: Learner, config: RLConfig) -> None:
    """Run one batch of short responses, so that the first measured one pays for nothing that is done once."""
    usual, config.sampling.max_new_tokens = config.sampling.max_new_tokens, 4
    one_batch(learner, config, 1)
    config.sampling.max_new_tokens = usual


def one_batch(learner: Learner, config: RLConfig, step: int) -> dict[str, float]:
    """Sample, score and learn from one batch as `train` does, and return the seconds of each phase."""
    session, began = TrainingSession(), time.perf_counter()
    train_batch(session, learner, config, step)
    times = {name: session.clock[name] for name in ("generate", "score")}
    return times | {"update": time.perf_counter() - began - sum(times.values())}


def phase_figures(book: Book, phase: str, whole: float, batches: int, tokens: int) -> dict[str, float]:
    """Return the seconds and operations of one phase, a batch, and what of them is attention's.

    Raises:
        RuntimeError: no attention call was seen in the phase, so that nothing could be taken off.
    """
    counts = {kind: count / batches for kind, count in book.counts.items() if kind.phase == phase}
    if not counts:
        raise RuntimeError(f"length: no attention call was seen in phase {phase}; transformers' registry is not used")
    alone = seconds_of(book, list(counts))
    found = {
        "s": whole,
        "attention_s": sum(alone[kind] * count for kind, count in counts.items()),
        "attention_operations": sum(operations(kind) * count for kind, count in counts.items()),
    }
    return per_token(found, tokens)


def per_token(found: dict[str, float], tokens: int) -> dict[str, float]:
    """Return the figures with milliseconds a token, all of it and apart from attention."""
    apart = found["s"] - found["attention_s"]
    return {**found, "apart_s": apart, "token_ms": found["s"] / tokens * 1e3, "token_apart_ms": apart / tokens * 1e3}


def operations(kind: Kind) -> float:
    """Return the multiplications and additions of q·k and weights·v over the pairs that a causal mask leaves."""
    batch, heads, queries, size = kind.query
    keys = kind.key[2]
    pairs = queries * (keys - (queries - 1) / 2)
    return 4.0 * batch * heads * size * pairs * (3 if kind.phase == "update" else 1)


def seconds_of(book: Book, kinds: list[Kind]) -> dict[Kind, float]:
    """Return the seconds of one call of each kind, decoding's timed at `KNOTS` numbers of keys and interpolated."""
    one = sorted((k for k in kinds if k.query[2] == 1), key=lambda k: k.key[2])
    found = {kind: alone(book, kind) for kind in kinds if kind.query[2] != 1}
    if len(one) <= KNOTS:
        return found | {kind: alone(book, kind) for kind in one}
    knots = [one[round(i * (len(one) - 1) / (KNOTS - 1))] for i in range(KNOTS)]
    at, timed = [k.key[2] for k in knots], [alone(book, k) for k in knots]
    return found | {kind: interpolated(kind.key[2], at, timed) for kind in one}


def interpolated(x: int, at: list[int], values: list[float]) -> float:
    """Return the value at `x` on straight lines between the points; `x` lies within them."""
    right = next(i for i, point in enumerate(at) if point >= x)
    if right == 0:
        return values[0]
    part = (x - at[right - 1]) / (at[right] - at[right - 1])
    return values[right - 1] + part * (values[right] - values[right - 1])


def alone(book: Book, kind: Kind) -> float:
    """Return the median seconds of one call on random tensors, with its backward pass in the update."""
    train = kind.phase == "update"
    shapes = (kind.query, kind.key, kind.value)
    tensors = [torch.randn(s, dtype=torch.float32).to(kind.dtype).requires_grad_(train) for s in shapes]

    def run() -> None:
        with torch.set_grad_enabled(train):
            out = book.again[kind](*tensors)
        if train:
            torch.autograd.grad(out, tensors, torch.ones_like(out))

    run()
    times: list[float] = []
    while len(times) < 2 or (sum(times) < SECONDS and len(times) < MOST):
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


def table(found: dict[str, Any]) -> str:
    """Return the figures as text, a line a phase and length."""
    head = f"{found['model']}, {found['threads']} threads, {found['epochs']} epochs, torch {found['torch']}"
    lines = [
        head,
        f"{'':12}{'phase':10} {'seconds':>9} {'attention':>10} {'its GFLOP':>10} {'ms/token':>9} {'apart':>8}",
    ]
    for row in found["lengths"]:
        for place, name in enumerate((*PHASES, "batch")):
            which, phase = f"{row['rows']} × {row['tokens']}" if place == 0 else "", row[name]
            counted = phase["attention_operations"] / 1e9
            lines.append(
                f"{which:12}{name:10} {phase['s']:>9.3f} {phase['attention_s']:>10.3f} {counted:>10.4g} "
                f"{phase['token_ms']:>9.3f} {phase['token_apart_ms']:>8.3f}"
            )
    short, long = (f(row["tokens"] for row in found["lengths"]) for f in (min, max))
    lines.append(f"time a token at {long} over {short}, raw and apart from attention:")
    lines += [f"{'':12}{name:10} {r['raw']:>9.2f} {r['apart']:>10.2f}" for name, r in found["ratio"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
