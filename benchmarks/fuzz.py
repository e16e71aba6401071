"""Throws drawn inputs at the data readers, the configuration parser and the offset mapping for some CPU-minutes.

    python benchmarks/fuzz.py --target readers --minutes 10 --seed 0

Only an ApportionError may come out of any of them, and what `tests/support/fuzzing.py` says of each must hold. Prints
one JSON object; the exit code is 1 when something was found, with the smallest input that shows it and the seed that
draws it. What is found becomes a test in tests/faults/test_fuzz.py.
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

ROUND = 200  # examples; each round has a seed of its own, so that memory of what was drawn stays small


def one_round(check: Callable[[st.DataObject], None], number: int, examples: int = ROUND) -> int:
    """Check inputs drawn with seed `number`; return how many. Raises what the first failing one raised, shrunk."""
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
    def drawn(data: st.DataObject) -> None:
        nonlocal count
        count += 1
        check(data)

    drawn()
    return count


def fuzz(target: str, minutes: float, first: int) -> dict[str, object]:
    """Run rounds until `minutes` of this process's CPU time are over or something is found."""
    began, rounds, examples = time.process_time(), 0, 0
    failure = None
    while failure is None and time.process_time() - began < 60 * minutes:
        try:
            examples += one_round(TARGETS[target], first + rounds)
        except Exception as error:  # whatever comes out is what was looked for
            failure = "".join(traceback.format_exception(error))
        rounds += 1
    spent = (time.process_time() - began) / 60
    found = {"target": target, "seed": first, "rounds": rounds, "examples": examples, "cpu_minutes": round(spent, 2)}
    return found | {"failure": failure, "failing_seed": None if failure is None else first + rounds - 1}


def main() -> int:
    """Read the flags, fuzz, print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", choices=sorted(TARGETS), required=True)
    parser.add_argument("--minutes", type=float, default=10.0, help="CPU time")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; the others count on from it")
    given_flags = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    found = fuzz(given_flags.target, given_flags.minutes, given_flags.seed)
    failure = found.pop("failure")
    if failure is not None:
        sys.stderr.write(str(failure))
    print(json.dumps(found | {"found": failure is not None}))
    return int(failure is not None)


if __name__ == "__main__":
    sys.exit(main())
