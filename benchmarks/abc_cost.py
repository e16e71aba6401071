"""Cost of ABC in a scoring forward: its operations timed separately and in pairs, and its memory.

    python -m benchmarks.abc_cost                        # SmolLM2-135M, 256 and 1,024 tokens, a good minute
    python -m benchmarks.abc_cost --random llama-135m    # the same shapes with random weights; no download
    python -m benchmarks.abc_cost --json

"alone" is the cost of the attention row without the scoring forward: wrapping the registry, recording q and k in every
layer, one softmax row of the last layer, its head mean and its normalisation. The forward is timed separately in the
same run. "paired" is the difference between a forward with the row and one without, in interleaved rounds; "null" is
that between two forwards without it, in the same rounds: an error of "null" is an error of "paired".
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apportion.cli.main import quiet_libraries
from apportion.masking import normalise
from apportion.models.attention.row import AttentionTap, attention_row
from apportion.models.loading import load_classifier, locate
from benchmarks.harness.measuring import SHAPES, difference, median_interval, rounds  # noqa: F401


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table or JSON, and return 0."""
    options = parse(arguments)
    quiet_libraries()
    torch.set_num_threads(options.threads)
    model = build(options)
    rows = [measure(model, length, options) for length in options.tokens]
    result = {
        "model": options.random or options.model,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "batch": options.batch,
        "torch": torch.__version__,
        "lengths": rows,
    }
    sys.stdout.write(json.dumps(result) + "\n" if options.json else table(result))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a built-in name, a folder or a hub id")
    parser.add_argument("--random", choices=sorted(SHAPES), help="random weights of these shapes instead of --model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024], help="sequence lengths")
    parser.add_argument("--batch", type=int, default=1, help="sequences a forward")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repetitions", type=int, default=200, help="of ABC's operations alone")
    parser.add_argument("--pairs", type=int, default=12, help="rounds of forwards with and without the tap")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def build(options: argparse.Namespace) -> Any:
    """Return the 2-label classifier to score with; its head is randomly initialised, which costs the same."""
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    if options.random is None:
        folder = locate("--model", options.model)
        return load_classifier("--model", folder, dtype, torch.device("cpu"), new_head=2)
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(**SHAPES[options.random], num_labels=2, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    return LlamaForSequenceClassification(config).to(dtype).eval()


@torch.no_grad()
def measure(model: Any, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one sequence length; times in seconds, ratios as fractions of the scoring forward."""
    generator = torch.Generator().manual_seed(length)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(2, vocabulary, (options.batch, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows, mask = torch.full((options.batch,), length - 1), torch.ones_like(ids, dtype=torch.bool)

    def plain() -> None:
        model(**inputs)

    def with_row() -> None:
        with attention_row(model) as tap:
            model(**inputs)
        finish(tap, rows, mask)

    plain(), with_row()  # warm up
    without, tapped, again = rounds((plain, with_row, plain), options.pairs)
    forward = statistics.median(without + again)
    alone = timed_alone(model, inputs, rows, mask, options.repetitions)
    return {
        "tokens": length,
        "forward_s": forward,
        "alone_s": statistics.median(alone),
        "alone_ratio": statistics.median(alone) / forward,
        "repetitions": len(alone),
        "pairs": len(without),
        **difference("paired", without, tapped, forward),
        **difference("null", without, again, forward),
        **memory(plain, with_row, length),
    }


def finish(tap: AttentionTap, rows: Tensor, mask: Tensor) -> Tensor:
    """Return α (B,K), as scoring and the credit compute it from the tap after the forward."""
    return normalise(torch.where(mask, tap.weights(rows).mean(dim=1), 0.0), mask)[0]


def timed_alone(model: Any, inputs: dict[str, Tensor], rows: Tensor, mask: Tensor, repetitions: int) -> list[float]:
    """Return the seconds of each repetition of ABC's own operations, on the q and k of a real forward."""
    with attention_row(model) as tap:
        model(**inputs)
    call = tap._calls[tap.layers[-1]]
    layers = model.config.get_text_config().num_hidden_layers
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        with attention_row(model) as tap:
            tap._begin(model, ())
            for _ in range(layers):
                tap._record(call)
            tap._end(model, (), None)
        finish(tap, rows, mask)
        times.append(time.perf_counter() - began)
    return times


class Allocations(TorchDispatchMode):
    """Collects (shape, bytes) of every tensor that operations allocate, except views."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[tuple[int, ...], int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.seen[(tuple(x.shape), x.numel() * x.element_size())] += 1
        return out


def memory(plain: Callable[[], None], with_row: Callable[[], None], length: int) -> dict[str, Any]:
    """Return the largest tensor that only the forward with the row allocates, and how many of them are T×T."""
    seen = []
    for run in (plain, with_row):
        with Allocations() as allocations:
            run()
        seen.append(allocations.seen)
    extra = seen[1] - seen[0]
    shape, size = max(extra, key=lambda item: item[1])
    square = [s for s, _ in extra.elements() if sum(n >= length for n in s) >= 2]
    return {
        "extra_bytes": size,
        "extra_shape": list(shape),
        "extra_square": len(square),
        "square_bytes": length * length * 4,
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as text, a line a length."""
    head = f"{result['model']}, {result['dtype']}, {result['threads']} threads, batch {result['batch']}"
    names = f"{'tokens':>7} {'forward':>10} {'ABC alone':>11} {'ratio':>8}   {'paired (95%)':26} null (95%)"
    lines = [f"{head}, torch {result['torch']}", names]
    for row in result["lengths"]:
        both = [
            f"{row[f'{name}_ratio']:+.2%} [{row[f'{name}_ratio_low']:+.2%}, {row[f'{name}_ratio_high']:+.2%}]"
            for name in ("paired", "null")
        ]
        lines.append(
            f"{row['tokens']:>7} {row['forward_s'] * 1e3:>7.1f} ms {row['alone_s'] * 1e6:>8.0f} µs "
            f"{row['alone_ratio']:>8.3%}   {both[0]:26} {both[1]}"
        )
    for row in result["lengths"]:
        square = "no" if row["extra_square"] == 0 else str(row["extra_square"])
        lines.append(
            f"largest extra tensor at {row['tokens']} tokens: {row['extra_shape']}, {row['extra_bytes']:,} bytes "
            f"({square} T×T tensor; one would be {row['square_bytes']:,} bytes a head)"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
