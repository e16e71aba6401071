"""Speed of generation: our sampler and transformers' generate, each beside the bound of the machine.

    python -m benchmarks.generation_speed                        # SmolLM2-135M, 64 rows, a minute
    python -m benchmarks.generation_speed --random llama-135m    # the same shapes with random weights
    python -m benchmarks.generation_speed --json --continuous    # transformers' continuous batching as well

A step is one new token of every row: (time of --new tokens − time of 1 token) / (new − 1), so that the prompts are
excluded; tokens/s include everything. Its bound is the larger of two times, both from rates measured in the same run:
bytes (every multiplied weight, once, and the keys and values at the mean length) over the rate of reading a
warm preallocated buffer of 0.5 GB, and operations (2 a multiplied weight and row, and 4 a key, head and dimension of
attention) over the rate of a 4096³ matrix product in the weights' dtype. Rounds are interleaved; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from apportion.cli.main import quiet_libraries
from apportion.config import SamplingConfig
from apportion.generation import sample
from apportion.models.loading import load_causal, locate, pick_device, pick_dtype
from apportion.models.policy import Policy
from apportion.system import cpu
from benchmarks.harness.machine import SIZES, matmul_rate, read_bandwidth
from benchmarks.harness.measuring import SHAPES

PAD, EOS = 0, 1


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table or JSON, and return 0."""
    options = parse(arguments)
    quiet_libraries()
    cpu.keep_freed_memory()  # as every command does
    if options.threads:
        torch.set_num_threads(options.threads)
    result = measure(build(options), options)
    sys.stdout.write(json.dumps(result) + "\n" if options.json else table(result))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a built-in name, a folder or a hub id")
    parser.add_argument("--random", choices=sorted(SHAPES), help="random weights of these shapes instead of --model")
    parser.add_argument("--rows", type=int, default=64, help="responses generated together")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a response")
    parser.add_argument("--rounds", type=int, default=3, help="alternations of ours and generate")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--matmul_sizes", type=int, nargs="+", default=SIZES, help="of the machine's rate")
    parser.add_argument("--threads", type=int, help="of the processor; the default is torch's")
    parser.add_argument("--continuous", action="store_true", help="measure transformers' generate_batch as well")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.new < 2:
        parser.error("--new: a step needs at least 2 new tokens")
    return options


def build(options: argparse.Namespace) -> Any:
    """Return the causal language model."""
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    if options.random is None:
        return load_causal("--model", locate("--model", options.model), dtype, device)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[options.random], pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS)
    return LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()


@torch.no_grad()
def measure(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures; times in seconds."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, model.config.vocab_size, (options.rows, options.prompt), generator=generator)
    ways = {"ours": ours(model, prompts), "generate": peer(model, prompts)}
    if options.continuous:
        ways["generate_batch"] = continuous(model, prompts)
    times: dict[str, dict[int, list[float]]] = {name: {1: [], options.new: []} for name in ways}
    failed: dict[str, str] = {}
    for turn in range(options.rounds + 1):  # the first is a warm-up
        for name in ways.keys() - failed.keys():
            for new in (1, options.new):
                try:
                    took = timed(lambda way=ways[name], new=new: way(new), model.device)
                except (RuntimeError, ValueError, TypeError, ImportError, NotImplementedError) as error:
                    if name != "generate_batch":
                        raise
                    failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                    break
                if turn:
                    times[name][new].append(took)
    limit = bound(model, options)
    return {
        "model": options.random or options.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        **{name: getattr(options, name) for name in ("rows", "prompt", "new", "rounds")},
        **limit,
        **{name: figures(times[name], limit["bound_s"], options) for name in ways if name not in failed},
        **{name: {"failed": reason} for name, reason in failed.items()},
        "torch": torch.__version__,
    }


def figures(times: dict[int, list[float]], bound_s: float, options: argparse.Namespace) -> dict[str, float]:
    """Return tokens/s over everything, the median, minimum and maximum time of a step, and the bound over it."""
    steps = [(full - one) / (options.new - 1) for one, full in zip(times[1], times[options.new], strict=True)]
    step = statistics.median(steps)
    return {
        "tokens_per_s": options.rows * options.new / statistics.median(times[options.new]),
        "read_s": statistics.median(times[1]),
        "step_s": step,
        "step_low_s": min(steps),
        "step_high_s": max(steps),
        "of_bound": bound_s / step,
    }


def ours(model: Any, prompts: torch.Tensor) -> Callable[[int], Any]:
    """Return new -> rollouts of our sampler."""
    policy, rows = Policy(model, SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS), [PAD, EOS]), prompts.tolist()

    def generate(new: int) -> Any:
        config = SamplingConfig(batch_size=len(rows), max_new_tokens=new)
        return sample(policy, rows, config, torch.Generator().manual_seed(1))

    return generate


def peer(model: Any, prompts: torch.Tensor) -> Callable[[int], Any]:
    """Return new -> ids of transformers' generate, sampling from the whole distribution as ours does."""
    ids = prompts.to(model.device)

    def generate(new: int) -> Any:
        return model.generate(ids, attention_mask=torch.ones_like(ids), **settings(new))

    return generate


def continuous(model: Any, prompts: torch.Tensor) -> Callable[[int], Any]:
    """Return new -> the responses of transformers' continuous batching."""
    from transformers import GenerationConfig

    def generate(new: int) -> Any:
        result = model.generate_batch(
            prompts.tolist(), generation_config=GenerationConfig(**settings(new)), progress_bar=False
        )
        short = [len(one.generated_tokens) for one in result.values() if len(one.generated_tokens) != new]
        if short or len(result) != len(prompts):
            raise RuntimeError(
                f"wrote {len(result)} of {len(prompts)} responses, {len(short)} of them shorter than {new}"
            )
        return result

    return generate


def settings(new: int) -> dict[str, Any]:
    """Return generate's settings for exactly `new` tokens from softmax(logits)."""
    fixed = {"max_new_tokens": new, "eos_token_id": None, "pad_token_id": PAD}
    return {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, **fixed}


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that `function` takes, with what it left on the device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def bound(model: Any, options: argparse.Namespace) -> dict[str, float]:
    """Return what a step at the mean length must read and multiply, the machine's rates, and the least time."""
    config = model.config
    head, layers = model.get_output_embeddings().weight, config.num_hidden_layers
    inside = sum(p.numel() for p in model.base_model.parameters() if p.dim() == 2)
    weights = inside - model.get_input_embeddings().weight.numel() + head.numel()
    length = options.prompt + options.new / 2
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = 2 * options.rows * length * layers * config.num_key_value_heads * size
    attention = 4 * options.rows * length * layers * config.num_attention_heads * size
    moved, operations = (weights + kept) * head.element_size(), 2 * weights * options.rows + attention
    device = model.device.type
    bandwidth, rate = read_bandwidth(device=device), matmul_rate(model.dtype, device=device, sizes=options.matmul_sizes)
    least = {"bytes_s": moved / bandwidth, "operations_s": operations / rate}
    shown = {"bytes": moved, "operations": operations, "bytes_per_s": bandwidth, "operations_per_s": rate}
    return {**shown, **least, "bound_s": max(least.values())}


def table(result: dict[str, Any]) -> str:
    """Return the figures for a reader."""
    lines = [
        f"{result['model']}, {result['dtype']}, {result['device']}, {result['threads']} threads; "
        f"{result['rows']} rows, prompts of {result['prompt']} tokens, {result['new']} new",
        f"machine: {result['operations_per_s'] / 1e9:,.0f} GFLOP/s, reads {result['bytes_per_s'] / 1e9:.1f} GB/s; "
        f"a step is {result['operations'] / 1e9:.2f} GFLOP ({result['operations_s'] * 1e3:.2f} ms) and "
        f"{result['bytes'] / 1e9:.3f} GB ({result['bytes_s'] * 1e3:.2f} ms)",
        f"{'':16}{'tokens/s':>10}{'prompts s':>11}{'step ms':>9}{'least–most':>16}{'of the bound':>14}",
    ]
    for name in ("ours", "generate", "generate_batch"):
        row = result.get(name, {})
        if "failed" in row:
            lines.append(f"{name:16}does not run here: {row['failed']}")
        elif row:
            span = f"{row['step_low_s'] * 1e3:.1f}–{row['step_high_s'] * 1e3:.1f}"
            lines.append(
                f"{name:16}{row['tokens_per_s']:>10,.0f}{row['read_s']:>11.2f}{row['step_s'] * 1e3:>9.1f}{span:>16}"
                f"{row['of_bound']:>13.0%}"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
