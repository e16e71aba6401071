"""Fuzzing of the data readers, the configuration parser and the offset mapping for some CPU-minutes.

    python -m benchmarks.fuzz --target readers --minutes 10 --seed 0

Only an ApportionError may be raised by any of them, and the properties in `tests/support/fuzzing.py` must hold. Prints
one JSON object; exit code 1 after a failure, with the smallest failing input and the seed that reproduces it. Failing
inputs become tests in tests/faults/test_fuzz.py.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from fuzzing import TARGETS
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

ROUND = 200  # examples; a new seed each, so that hypothesis keeps little in memory


def one_round(check: Callable[[st.DataObject], None], number: int, examples: int = ROUND) -> int:
    """Check inputs sampled with seed `number`; return how many. Raises the error of the first failing one, shrunk."""
    count = 0

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.data())
    def check_one(data: st.DataObject) -> None:
        nonlocal count
        count += 1
        check(data)

    check_one()
    return count


def fuzz(target: str, minutes: float, first: int) -> dict[str, object]:
    """Run rounds until `minutes` of this process's CPU time are over or a check fails."""
    began, rounds, examples = time.process_time(), 0, 0
    failure = None
    while failure is None and time.process_time() - began < 60 * minutes:
        try:
            examples += one_round(TARGETS[target], first + rounds)
        except Exception as error:  # any error is a failure
            failure = "".join(traceback.format_exception(error))
        rounds += 1
    spent = (time.process_time() - began) / 60
    result = {"target": target, "seed": first, "rounds": rounds, "examples": examples, "cpu_minutes": round(spent, 2)}
    return result | {"failure": failure, "failing_seed": None if failure is None else first + rounds - 1}


def main() -> int:
    """Parse the flags, fuzz, print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", choices=sorted(TARGETS), required=True)
    parser.add_argument("--minutes", type=float, default=10.0, help="CPU time")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; later rounds increment it")
    options = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    result = fuzz(options.target, options.minutes, options.seed)
    failure = result.pop("failure")
    if failure is not None:
        sys.stderr.write(str(failure))
    print(json.dumps(result | {"found": failure is not None}))
    return int(failure is not None)


if __name__ == "__main__":
    sys.exit(main())
