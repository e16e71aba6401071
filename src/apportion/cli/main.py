"""The command line: dispatch to a command, and errors as one message with its fix (exit code 2)."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence

from apportion.distributed import launcher
from apportion.errors import ApportionError, ConfigError, Interrupted, unknown_name
from apportion.system import stderr
from apportion.system.heartbeat import heartbeat

# name -> (module, one line of help)
COMMANDS: Mapping[str, tuple[str, str]] = {
    "demo": ("demo", "reward model, PPO with dense credit, an independent judge and a page, in minutes"),
    "run": ("chain.run", "the stages of a recipe in order, finished ones skipped"),
    "split": ("chain.split", "split people's rankings by prompt: to train on, and held out"),
    "sft": ("supervised.sft", "fine-tune a model on demonstrations"),
    "sample": ("sample", "write K answers to every prompt, for people to rank or a reward model to score"),
    "label": ("label", "a page where people rank answers, with exports, imports and agreement"),
    "reward": ("reward", "train a reward model on labelled texts, preference pairs or rankings"),
    "rl": ("rl", "train a policy with its reward apportioned over the tokens"),
    "dpo": ("supervised.dpo", "train a policy on preference pairs or rankings, without a reward model"),
    "evaluate": ("evaluate", "compare policies on the same prompts, or one with its start"),
    "credit": ("inspection.credit", "show which tokens of a text a reward model's score falls on"),
    "diagnose": ("inspection.diagnose", "say which credit suits a policy and a reward model, before any training"),
    "doctor": ("inspection.doctor", "check a run before it starts, or a credit method of your own; show the cores"),
    "report": ("report", "draw run folders on one page that works offline"),
    "algorithms": ("algorithms", "list algorithms, credit methods, segments, estimators and losses"),
}

PARALLEL = ("rl", "reward")  # commands that several processes can share
CHECKPOINTED = ("demo", "run", "sft", "reward", "rl", "dpo")  # commands that write checkpoints

USAGE = """usage: apportion COMMAND [options]

Find out which tokens earned the reward, and train on it.

{commands}

`apportion COMMAND --help` explains a command and every setting. Start with:

  apportion demo
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 on success, 2 after a user error, 130 or 143 after a signal."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0
    if arguments[0] == "--version":
        from apportion import __version__

        sys.stdout.write(f"apportion {__version__}\n")
        return 0
    quiet_libraries()
    try:
        with heartbeat(launcher.is_log_rank()):
            return run(arguments[0], arguments[1:])
    except ApportionError as error:
        write_error(f"apportion: {error}\n")
        return 2
    except Interrupted as end:
        write_error(f"apportion: {end} Resume with:\n\n  {resume_command(arguments)}\n")
        return end.code
    except KeyboardInterrupt:
        write_error(f"apportion: interrupted; {after_interrupt(arguments[0])}.\n")
        return 130
    finally:
        if launcher.group_rank is not None:
            from apportion.distributed import collectives

            collectives.stop()


def after_interrupt(name: str) -> str:
    """Return what running command `name` again does after an interrupt that came between checkpoints, or before one."""
    if name == "sample":
        return "the same command resumes after the last row that was written"
    if name == "evaluate":
        return "with --policies the same command resumes after what was finished, without them it starts over"
    if name in CHECKPOINTED:
        return "the same command resumes from the last checkpoint, or starts over where there is none yet"
    return f"`apportion {name}` writes no checkpoints: the same command starts over"


def resume_command(arguments: Sequence[str]) -> str:
    """Return the command that resumes an interrupted run: the same one, without --fresh."""
    command = shlex.join(["apportion", *(word for word in arguments if word != "--fresh")])
    processes = launcher.launched()
    return command if processes == 1 else f"{command}    (in {processes} processes, through the same launcher)"


def write_error(text: str) -> None:
    """Write `text` to stderr, in only one of several processes."""
    if launcher.is_log_rank():
        stderr.write(text)


def run(name: str, arguments: Sequence[str]) -> int:
    """Run command `name`. Raises ConfigError where it is unknown, or cannot run in several processes."""
    if name == "bench":
        fix = "In a checkout: `python -m benchmarks.speed`, `benchmarks.faults` or `benchmarks.soak`."
        raise ConfigError("command", name, "a command; the benchmarks are no part of the package", fix)
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    if launcher.launched() > 1 and name not in PARALLEL:
        got = f"`apportion {name}` in {launcher.launched()} processes"
        fix = "Start it without accelerate launch and torchrun."
        raise ConfigError("command", got, f"one process; {' and '.join(PARALLEL)} can share their work", fix)
    module = importlib.import_module(f"apportion.cli.{COMMANDS[name][0]}")
    code: int = module.run(list(arguments))
    return code


def usage() -> str:
    """Return the help of the command line itself."""
    width = max(map(len, COMMANDS))
    return USAGE.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()))


def quiet_libraries() -> None:
    """Silence progress bars and advice of other libraries, and switch telemetry off."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch")


if __name__ == "__main__":
    sys.exit(main())
