"""PPO beside PPO-ptx: what the mix does to the likelihood of such texts, and what it costs in reward.

    python -m benchmarks.ppo_ptx --reward_model runs/demo/reward/final              # 3 seeds, six runs
    python -m benchmarks.ppo_ptx --reward_model ... --first_seed 100 --coef 0.3     # choose the coefficient here

Runs of `apportion rl` in processes of their own, one with and one without ppo.ptx_coef (Ouyang et al. 2022, arXiv
2203.02155, equation 2) of each seed. NLL is nats a token of held-out texts of the mix under the final policy, by plain
transformers; the reward is the mean raw score, and KL that in nats a response, of the last batches. Intervals are
Student's over seeds, of paired differences. Runs in --output are not run again; seeds can be added.

Exit code 1 where the interval of the NLL's difference does not lie below 0, or that of the reward's does not hold 0.
The second says only that these seeds show no difference: read its width.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from apportion.data import labelled
from apportion.errors import ApportionError, ConfigError
from apportion.models.loading import locate
from apportion.system import cpu
from benchmarks.harness.machine import describe
from benchmarks.harness.stored import load_parts, named, run_module, save_parts
from benchmarks.ppo_ptx.figures import compared, table
from benchmarks.ppo_ptx.likelihood import held_out_rows, nll_of

SHARED = ("policy", "prompts", "mix", "held_out", "texts", "mix_tokens", "coef", "steps", "last", "rl")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing in --output and print the comparison; 1 where it does not show what PPO-ptx is for."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        return measure(options)
    except ApportionError as error:
        print(error, file=sys.stderr)
        return 2


def measure(options: argparse.Namespace) -> int:
    """Run, measure and print."""
    settings, texts = settings_of(options), held_out_texts(options)
    done = load_parts(options.output, settings)
    rows = held_out_rows(options.policy, texts, options.mix_tokens)
    if "start" not in done:
        done["start"] = {"nll": nll_of(options.policy, rows)}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for side in ("ppo", "ptx"):
            name = f"{side} {seed}"
            if name not in done:
                print(f"{name} …", file=sys.stderr, flush=True)
                folder = options.folder / f"{side}-{seed}"
                log = options.folder / f"{folder.name}.log"
                words = ["rl", "--output", folder, *flags(options, side, seed)]
                run_module("apportion", *words, threads=options.threads, log=log)
                done[name] = {"nll": nll_of(folder / "final", rows), **last_batches(folder, options.last)}
                save_parts(options.output, settings, done)
    parts = {name: part for name, part in done.items() if name != "start"}
    found = compared(parts, done["start"]["nll"])
    save_parts(options.output, settings, done, compared=found, machine=describe())
    print(table(parts, found))
    return 0 if found["passed"] else 1


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what all runs of a file have in common; of files and of the reward model's weights, a digest."""
    weights = sorted(Path(locate("--reward_model", options.reward_model)).glob("*.safetensors"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
    files = {name: named(getattr(options, name)) for name in ("mix", "held_out", "prompts")}
    return {name: getattr(options, name) for name in SHARED} | files | {"reward_model": digest}


def held_out_texts(options: argparse.Namespace) -> Path:
    """Return the file of held-out texts: --held_out, or reviews that no stage learns from.

    Raises:
        ConfigError: a mix of the user's own without held-out texts.
    """
    if options.held_out is not None:
        return Path(options.held_out)
    if options.mix != "imdb":
        raise ConfigError("--held_out", None, "a file of texts that are like the mix", "Give texts that it lacks.")
    found = [row.text for row in labelled("imdb", "evaluate_validation")]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[: options.texts].tolist()
    options.folder.mkdir(parents=True, exist_ok=True)
    path: Path = options.folder / "held_out.jsonl"
    path.write_text("".join(json.dumps({"text": found[i]}) + "\n" for i in order), encoding="utf-8")
    return path


def flags(options: argparse.Namespace, side: str, seed: int) -> list[object]:
    """Return the flags of `apportion rl` of one run, the same for both sides but for the mix."""
    same = ["--policy", options.policy, "--reward_model", options.reward_model, "--prompts", options.prompts]
    same += ["--steps", options.steps, "--seed", seed, "--threads", options.threads, "--checkpoint_every", 0]
    more = [word for text in options.rl for word in (f"--{text.partition('=')[0]}", text.partition("=")[2])]
    mixed = ["--ppo.ptx_coef", options.coef, "--ppo.ptx_data", options.mix, "--ppo.ptx_tokens", options.mix_tokens]
    return [*same, *more, *(mixed if side == "ptx" else [])]


def last_batches(folder: Path, count: int) -> dict[str, float]:
    """Return the mean raw score and KL of the last `count` batches of a run."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][-count:]
    names = {"reward": "objective/scores", "kl": "objective/kl"}
    return {name: statistics.fmean(row[key] for row in rows) for name, key in names.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reward_model", required=True, help="a trained reward model: a folder")
    parser.add_argument("--policy", default="smollm2", help="the start: a built-in name or a folder")
    parser.add_argument("--prompts", default="imdb")
    parser.add_argument("--mix", default="imdb", help="`imdb` (reviews), or a file as ppo.ptx_data takes it")
    parser.add_argument("--held_out", help="a file of texts of the same kind that the mix lacks; null only for imdb")
    parser.add_argument("--texts", type=int, default=256, help="held-out reviews, without --held_out")
    parser.add_argument("--mix_tokens", type=int, default=128, help="longest text, tokens")
    parser.add_argument("--coef", type=float, default=0.1, help="ppo.ptx_coef")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--last", type=int, default=5, help="batches at the end whose reward and KL are averaged")
    parser.add_argument("--rl", nargs="+", default=[], help="more settings of both sides, as optim.lr=5e-4")
    parser.add_argument("--threads", type=int, default=cpu.available_cores().count)
    parser.add_argument("--folder", type=Path, default=Path("runs/ppo_ptx"), help="run folders")
    parser.add_argument("--output", type=Path, default=Path("ppo-ptx.json"), help="results, one object a run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
