"""What a check finds, and how checks are run: one after another, each after those that it depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from apportion.errors import ApportionError, ModelError

if TYPE_CHECKING:
    from apportion.stages.doctor.case import Case

OK, WARN, FAIL, SKIP = "ok", "warn", "fail", "skip"
LEVELS = (OK, WARN, FAIL, SKIP)


class Finding(NamedTuple):
    """What one check found.

    `level` is "ok", "warn" (it may be meant; look at it), "fail" (the run would stop, or learn something else than
    meant) or "skip" (the question does not arise, or what it depends on failed). `found` says it in numbers, `fix`
    how to put it right; it is empty where there is nothing to fix.
    """

    name: str
    level: str
    found: str
    fix: str = ""


class Check(NamedTuple):
    """One question about a run.

    Attributes:
        name: of the line in the table.
        promise: what holds when it is answered with ok.
        ask: reads the case (the first checks also fill it) and returns (level, found, fix).
        after: names of checks without whose success it cannot be asked.
        error: what `apportion rl` raises when it fails.
        loads: whether it needs weights; `--fast` leaves it out.
        opens: whether it opens what a run opens as well, so that the run cannot do without.
        estimate: whether it is no certainty, so that a failure does not stop `apportion rl`.
    """

    name: str
    promise: str
    ask: Callable[[Case], tuple[str, str, str]]
    after: tuple[str, ...] = ()
    error: type[ApportionError] = ModelError
    loads: bool = False
    opens: bool = False
    estimate: bool = False

    def refusal(self, finding: Finding) -> ApportionError:
        """Return the error that says what `finding` says, in the one shape of every error."""
        return self.error(self.name, finding.found, self.promise, finding.fix)


def examine(case: Case, checks: Iterable[Check], tell: Callable[[str], None] = lambda name: None) -> list[Finding]:
    """Return what every check found, in order; `tell` is called with the name of each before it is asked.

    An error that a user can fix becomes a failure of the check that met it. So does any other exception, with its
    type, where models run and where files are opened: training would meet it as well. Elsewhere it is a warning.
    """
    found: dict[str, Finding] = {}
    for check in checks:
        lacking = [name for name in check.after if name in found and found[name].level in (FAIL, SKIP)]
        if lacking:
            found[check.name] = Finding(check.name, SKIP, f"not asked: {lacking[0]} comes first")
            continue
        tell(check.name)
        try:
            level, said, fix = check.ask(case)
        except ApportionError as error:
            level, (said, fix) = FAIL, parts(error)
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            level, fix = FAIL, "Training would meet the same error: try another model, or other settings."
            if not (check.loads or check.opens):  # the check may be at fault, and the run may work
                level, fix = WARN, "This could not be asked: report it, with these settings, if the run works."
        found[check.name] = Finding(check.name, level, said, fix)
    return list(found.values())


def parts(error: ApportionError) -> tuple[str, str]:
    """Return (what is wrong, the fix) of an error."""
    if not error.has_parts:
        return str(error), "Put right what it names."
    return str(error).removesuffix(error.saved).rstrip().removesuffix(error.fix).rstrip().removesuffix("."), error.fix


def ok(found: str) -> tuple[str, str, str]:
    """Return what a check says that found nothing to fix."""
    return OK, found, ""


def warn(found: str, fix: str) -> tuple[str, str, str]:
    """Return what a check says that found something to look at."""
    return WARN, found, fix


def fail(found: str, fix: str) -> tuple[str, str, str]:
    """Return what a check says that found something to fix."""
    return FAIL, found, fix


def skip(found: str) -> tuple[str, str, str]:
    """Return what a check says whose question does not arise."""
    return SKIP, found, ""


def together(*answers: tuple[str, str, str]) -> tuple[str, str, str]:
    """Return several answers as one: the worst level, all that was found, and each fix."""
    level = max((answer[0] for answer in answers), key=lambda level: (OK, WARN, FAIL).index(level))
    return level, "; ".join(said for _, said, _ in answers if said), " ".join(fix for *_, fix in answers if fix)


def graded(value: float, limits: tuple[float, float], found: str, fix: str) -> tuple[str, str, str]:
    """Return ok up to the first of `limits`, warn up to the second, else fail; a value that is no number fails."""
    if not value <= limits[1]:
        return fail(found, fix)
    return ok(found) if value <= limits[0] else warn(found, fix)
