"""Server that runs `apportion` commands in processes forked from one that has the libraries imported.

Starting Python and importing PyTorch takes seconds a process; a fork of this one takes milliseconds, and is as much a
process as any: its own exit code, stdout, stderr, environment and working folder.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
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


def serve(modules: tuple[str, ...]) -> None:
    """Read one JSON request a line, run it in a fork, answer with its exit status on a line; end with the input."""
    from apportion.cli.main import quiet_libraries

    quiet_libraries()
    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run(request)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def run(request: dict[str, Any]) -> None:
    """Become the command: its folder, its environment, its output files; write which model libraries it loaded."""
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    for stream, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666), stream)
    sys.argv = ["apportion", *request["argv"]]
    sys.path[:0] = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    code = 1
    try:
        from apportion.cli.main import main

        code = main()
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    with open(request["loaded"], "w") as file:
        json.dump([name for name in MODEL_LIBRARIES if name in sys.modules], file)
    os._exit(code)


if __name__ == "__main__":
    serve({"light": LIGHT, "heavy": HEAVY}[sys.argv[1]])
