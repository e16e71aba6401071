"""Entry point of `apportion` and `python -m apportion`: prepares the process, then runs the command line."""

from __future__ import annotations

import sys

from apportion.system import cpu


def main() -> int:
    """Run the command line and return its exit code."""
    cpu.configure_waiting()  # OpenMP reads its environment when torch is loaded, which the next import does
    cpu.keep_freed_memory()
    from apportion.cli.main import main as command_line

    return command_line()


if __name__ == "__main__":
    sys.exit(main())
