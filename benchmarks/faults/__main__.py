"""`python -m benchmarks.faults`: real runs are killed, resumed, and compared with undisturbed ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from benchmarks.faults.harness import faults
from benchmarks.faults.settings import FaultsConfig, check_faults
from benchmarks.harness.arguments import print_line, progress_lines, run_command, write_json

EXAMPLES = """examples:
  python -m benchmarks.faults                     # 50 kills, 3 of them on the whole model: some 20 minutes on two cores
  python -m benchmarks.faults --kills 12 --model_kills 0 --json
  python -m benchmarks.faults --kills 200 --seed 1 --out faults.json

Each run is killed (SIGKILL), resumed with the same command, and compared with an undisturbed run: SHA-256 of the final
weights, and every row of the logs except time/* and memory/*. Exit code 1 where one differs. docs/resume.md.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill runs; return 0 where each ended as its undisturbed reference did, else 1."""
    return run_command("faults", FaultsConfig, check_faults, _run, EXAMPLES, arguments)


def _run(config: FaultsConfig, as_json: bool) -> int:
    result = faults(config, progress_lines(config.kills))
    if config.out is not None:
        write_json(config.out, result)
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        for name in (key for key, value in result.items() if not isinstance(value, (dict, list))):
            sys.stdout.write(f"{name:<24}{result[name]}\n")
    if not result["enough"]:
        print_line(
            "not enough: fewer than a fifth of the kills hit a checkpoint, or fewer than half had one to resume."
        )
    identical = result["bit_identical"] == result["kills"]
    return int(not (identical and result["log_rows_lost"] == result["log_rows_doubled"] == 0))


if __name__ == "__main__":
    sys.exit(main())
