"""Checks and their findings: run one after another, each after those that it depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from apportion.errors import ApportionError, ModelError

if TYPE_CHECKING:
    from apportion.stages.doctor.case import Case

OK, WARN, FAIL, SKIP = "ok", "warn", "fail", "skip"


class Result(NamedTuple):
    """The result of one check: its level, a message with numbers, and the fix ("" where there is nothing to fix)."""

    level: str
    message: str
    fix: str = ""


class Finding(NamedTuple):
    """The result of a named check.

    `level` is "ok", "warn" (possibly intended; worth a look), "fail" (the run would stop, or learn something other than
    intended) or "skip" (the check does not apply, or one that it depends on failed).
    """

    name: str
    level: str
    message: str
    fix: str = ""


class Check(NamedTuple):
    """One check of a run.

    Attributes:
        name: as the table shows it.
        expected: what holds when the result is ok.
        function: takes the case and returns a Result; the first checks also fill the case.
        after: names of the checks that have to succeed first.
        error: what `apportion rl` raises when it fails.
        loads: whether it needs model weights; `--fast` skips it.
        opens: whether it opens what every run has to open.
        estimate: whether its result is an estimate, so that a failure does not stop `apportion rl`.
    """

    name: str
    expected: str
    function: Callable[[Case], Result]
    after: tuple[str, ...] = ()
    error: type[ApportionError] = ModelError
    loads: bool = False
    opens: bool = False
    estimate: bool = False

    def to_error(self, finding: Finding) -> ApportionError:
        """Return `finding` as the error that the run raises."""
        return self.error(self.name, finding.message, self.expected, finding.fix)


def run_checks(
    case: Case, checks: Iterable[Check], on_check: Callable[[str], None] = lambda name: None
) -> list[Finding]:
    """Run the checks in order and return their findings; `on_check` is called with the name of each before it runs.

    An ApportionError becomes a failure of the check that met it. So does any other exception, with its type, where
    models run or files are opened: training would meet it as well. Elsewhere it becomes a warning.
    """
    findings: dict[str, Finding] = {}
    for check in checks:
        blocking = [name for name in check.after if name in findings and findings[name].level in (FAIL, SKIP)]
        if blocking:
            findings[check.name] = Finding(check.name, SKIP, f"not run: {blocking[0]} comes first")
            continue
        on_check(check.name)
        try:
            result = check.function(case)
        except ApportionError as error:
            result = from_error(error)
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            result = fail(message, "Training would meet the same error: try another model, or other settings.")
            if not (check.loads or check.opens):  # the check may be wrong, and the run may work
                result = warn(message, "This check could not run: report it, with these settings, if the run works.")
        findings[check.name] = Finding(check.name, *result)
    return list(findings.values())


def from_error(error: ApportionError) -> Result:
    """Return an error as a failed result: the message without the fix, and the fix."""
    if not error.has_parts:
        return fail(str(error), "Correct what the message names.")
    message = str(error).removesuffix(error.saved).rstrip().removesuffix(error.fix).rstrip().removesuffix(".")
    return fail(message, error.fix)


def ok(message: str) -> Result:
    """Return the result of a check with nothing to fix."""
    return Result(OK, message)


def warn(message: str, fix: str) -> Result:
    """Return the result of a check that something should be looked at."""
    return Result(WARN, message, fix)


def fail(message: str, fix: str) -> Result:
    """Return the result of a check that something has to be fixed."""
    return Result(FAIL, message, fix)


def skip(message: str) -> Result:
    """Return the result of a check that does not apply."""
    return Result(SKIP, message)


def combine(*results: Result) -> Result:
    """Return several results as one: the worst level, every message and every fix."""
    level = max((result.level for result in results), key=lambda level: (OK, WARN, FAIL).index(level))
    return Result(level, "; ".join(r.message for r in results if r.message), " ".join(r.fix for r in results if r.fix))


def grade(value: float, limits: tuple[float, float], message: str, fix: str) -> Result:
    """Return ok up to the first of `limits`, warn up to the second, else fail; NaN fails."""
    if not value <= limits[1]:
        return fail(message, fix)
    return ok(message) if value <= limits[0] else warn(message, fix)
