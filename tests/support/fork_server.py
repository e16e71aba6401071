"""Server that runs `apportion` commands in processes forked from one that has the libraries imported.

Starting Python and importing PyTorch takes seconds a process; a fork of this one takes milliseconds, and is as much a
process as any: its own exit code, stdout, stderr, environment and working folder. Several of one request are the
processes of one distributed run: where one fails, the others are ended, as torchrun does.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from typing import Any

# no model library among them; runs call `torch.use_deterministic_algorithms`, which takes a second to import _inductor
STAGES = (
    "torch._inductor",
    "apportion.stages.rl.train",
    "apportion.stages.reward.train",
    "apportion.stages.evaluate.evaluate",
)
LIGHT = ("torch", "yaml", "pydantic", "rich.progress", "apportion.cli.main", "apportion.cli.rl", *STAGES)
HEAVY = (*LIGHT, "peft", "transformers.models.llama.modeling_llama")
MODEL_LIBRARIES = ("transformers", "peft", "trl", "accelerate", "datasets")
LIMIT = 240.0  # seconds of a request
GRACE = 30.0  # seconds in which the other processes may end by themselves after one that failed


def serve(modules: tuple[str, ...]) -> None:
    """Read one JSON request a line, run it in forks, answer with their exit statuses on a line; end with the input."""
    from apportion.cli.main import quiet_libraries

    quiet_libraries()
    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        codes = finish([start(json.loads(line), process) for process in range(len(json.loads(line)["processes"]))])
        sys.stdout.write(f"{json.dumps(codes)}\n")
        sys.stdout.flush()


def start(request: dict[str, Any], process: int) -> int:
    """Fork a process that runs the request, and return its id."""
    child = os.fork()
    if child == 0:
        run(request | request["processes"][process])
    return child


def finish(children: list[int]) -> list[int]:
    """Wait for all, and return their exit codes; those that take longer than `LIMIT`, or `GRACE` after one that failed,
    are ended."""
    codes: dict[int, int] = {}
    end = time.monotonic() + LIMIT
    while len(codes) < len(children):
        found, status = os.waitpid(-1, os.WNOHANG)
        if found:
            codes[found] = os.waitstatus_to_exitcode(status)
            end = min(end, time.monotonic() + (GRACE if codes[found] else LIMIT))
        elif time.monotonic() > end:
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGKILL)
            end = math.inf
        else:
            time.sleep(0.005)
    return [codes[child] for child in children]


def run(request: dict[str, Any]) -> None:
    """Become the command: its folder, its environment, its output files; write which model libraries it loaded."""
    with open(request["pid"], "w") as file:
        file.write(str(os.getpid()))
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    for stream, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666), stream)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (request.get("largest_file", limits[0]), limits[1]))
    sys.path[:0] = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    code = 1
    try:
        code = PROGRAMS[request["program"]](request["argv"])
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)  # what measures coverage writes a file too
    with open(request["loaded"], "w") as file:
        json.dump([name for name in MODEL_LIBRARIES if name in sys.modules], file)
    os._exit(code)


def command(words: list[str]) -> int:
    """Run `apportion WORDS`."""
    from apportion.cli.main import main

    sys.argv = ["apportion", *words]
    return main()


def file(words: list[str]) -> int:
    """Run `python WORDS`: a file and its arguments."""
    sys.argv = words
    sys.path.insert(0, os.path.dirname(words[0]))
    runpy.run_path(words[0], run_name="__main__")
    return 0


def module(words: list[str]) -> int:
    """Run `python -m WORDS`: a module and its arguments."""
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    return 0


PROGRAMS = {"apportion": command, "file": file, "module": module}

if __name__ == "__main__":
    serve({"light": LIGHT, "heavy": HEAVY}[sys.argv[1]])
