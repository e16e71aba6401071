"""Crash dump of a failed step: rollouts with every known per-token value, the error, metrics, and the traceback."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from apportion.distributed import collectives
from apportion.errors import ApportionError, DiskError
from apportion.system.disk import explain_disk_errors
from apportion.training.nonfinite import SkippedUpdates
from apportion.training.run_folder import RunFolder
from apportion.types import Rollouts
from apportion.user_code import FilesOnKill, UserCode, error_of

DECIMALS = 8  # with 6, the rounding of a hundred tokens' credit adds up to more than 1e-5 of the score
Column = Callable[[Rollouts], Tensor]


@dataclass
class BatchSnapshot:
    """What is known of the current batch, for the case that its step fails.

    Attributes:
        step, rollouts: which batch. is_local: the rollouts are this process's, not the whole batch.
        columns: tensors (B,T) by the name that rollouts.jsonl has for them. metrics: the batch's so far.
    """

    step: int
    rollouts: Rollouts
    is_local: bool = False
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class CrashDump:
    """Writes the batch of a failed step to RUN/stopped/step-N.

    Args:
        run: the run folder; None (a loop without one) writes nothing.
        tokenizer: decodes ids. user_code: calls user-supplied functions. modules: {module: "module:function"} of them.
        nonfinite: its `rows`, the rollouts of skipped updates, are marked `skipped`.
        lazy_columns: columns (B,T) of the whole batch, computed only when a step fails.
    """

    def __init__(
        self,
        run: RunFolder | None,
        tokenizer: Any,
        user_code: UserCode,
        modules: Mapping[str, str],
        nonfinite: SkippedUpdates,
        lazy_columns: Mapping[str, Column],
    ) -> None:
        self.run, self.tokenizer, self.user_code, self.modules = run, tokenizer, user_code, modules
        self.nonfinite, self.lazy_columns = nonfinite, lazy_columns

    def prepare(self, step: int, rollouts: Rollouts) -> None:
        """Hand over this process's rollouts, to be saved if a user-supplied function has to be killed."""
        if self.run is None or not self.modules or self.user_code.timeout is None:
            return
        run, target = self.run, folder_of(self.run.path, step)
        rows = to_lines(self.tokenizer, step, rollouts, {}, split=False)
        status = {"stage": run.stage, "name": run.path.name, "status": "failed", **run.status_fields}

        def files(error: str) -> dict[str, str]:
            # the end of any process is the run's: the launcher ends the main one before it can write its status
            content = json.dumps(status | {"error": error}, indent=2) + "\n"
            dump = {"rollouts.jsonl": rows, "error.txt": f"{error}\n"}
            return {str(target / name): text for name, text in dump.items()} | {str(run.path / "status.json"): content}

        self.user_code.files_on_kill = FilesOnKill(
            f"The rollouts are in {target}.", files, str(target / "traceback.txt")
        )

    @contextmanager
    def on_error(self, snapshot: BatchSnapshot) -> Iterator[None]:
        """Save the snapshot when the block fails with an error that a user can fix, or in user-supplied code.

        Raises:
            UserCodeError: user-supplied code raised. Other errors stay what they are; `saved` says where the batch is.
        """
        try:
            yield
        except (collectives.ProcessError, DiskError):
            raise
        except ApportionError as error:
            self._save(snapshot, error, error.__cause__)
            raise
        except (Exception, SystemExit) as error:
            name = self._responsible(error)
            if name is None:
                raise
            failure = error_of(name, error)
            self._save(snapshot, failure, error)
            raise failure from error

    def _responsible(self, error: BaseException) -> str | None:
        """Return the name of the user-supplied method whose module the error passed through, if any."""
        trace, name = error.__traceback__, None
        while trace is not None:
            name = self.modules.get(trace.tb_frame.f_globals.get("__name__", ""), name)
            trace = trace.tb_next
        return name

    def _save(self, snapshot: BatchSnapshot, error: ApportionError, cause: BaseException | None) -> None:
        """Save the snapshot and record in the error where."""
        if self.run is None or error.saved or not (snapshot.is_local or collectives.is_main()):
            return
        target = folder_of(self.run.path, snapshot.step)
        columns, missing = self._columns(snapshot)
        try:
            rows = to_lines(self.tokenizer, snapshot.step, snapshot.rollouts, columns, self.nonfinite.rows)
            write(target, rows, error, cause, snapshot.metrics)
            error.saved = f"The rollouts are in {target}{missing}."
        except DiskError as full:
            error.saved = f"The rollouts could not be saved: {full}"
        except Exception as second:  # the first error is the one to report
            reason = f"{type(second).__name__}: {' '.join(str(second).split())[:200]}"
            error.saved = f"The rollouts could not be saved ({reason})."

    def _columns(self, snapshot: BatchSnapshot) -> tuple[dict[str, Tensor], str]:
        """Return (every column that can be computed, words on the others): what failed may fail again."""
        columns, missing = dict(snapshot.columns), []
        for name, compute in {} if snapshot.is_local else self.lazy_columns.items():
            try:
                columns[name] = compute(snapshot.rollouts)
            except Exception as error:  # the first error is the one to report
                missing.append(f"{name} ({type(error).__name__})")
        return columns, f", without {', '.join(missing)}" if missing else ""


def folder_of(run: Path, step: int) -> Path:
    """Return RUN/stopped/step-N, with the rank of a process other than the main one."""
    name = f"step-{step}" if collectives.is_main() else f"step-{step}-process-{collectives.rank()}"
    return run / "stopped" / name


def write(
    target: Path, rows: str, error: BaseException, cause: BaseException | None, metrics: Mapping[str, float]
) -> None:
    """Write rollouts.jsonl (`rows`), error.txt, and metrics.json and traceback.txt (of `cause`) where there are any.

    Raises:
        DiskError: the folder `target` cannot be written to.
    """
    with explain_disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        (target / "rollouts.jsonl").write_text(rows, encoding="utf-8", errors="backslashreplace")
        (target / "error.txt").write_text(f"{error}\n", encoding="utf-8", errors="backslashreplace")
        if metrics:
            plain = {name: plain_number(value) for name, value in metrics.items()}
            (target / "metrics.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        if cause is not None:
            text = "".join(traceback.format_exception(cause))
            (target / "traceback.txt").write_text(text, encoding="utf-8", errors="backslashreplace")


def to_lines(
    tokenizer: Any,
    step: int,
    rollouts: Rollouts,
    columns: Mapping[str, Tensor],
    skipped: Sequence[int] = (),
    *,
    split: bool = True,
) -> str:
    """Return every rollout as a JSON line in the form of rollouts.jsonl, as far as it is known.

    Args:
        columns: further tensors (B,T) by name, as lists over the sampled tokens.
        skipped: rows of updates that were skipped, marked `skipped`.
        split: decode each token separately as well, which takes a millisecond for some tens of tokens.

    A number that is not finite is the text "NaN", "Infinity" or "-Infinity".
    """
    known = {"logprob": rollouts.logprobs, "old_logprob": rollouts.old_logprobs, **columns}
    rows = [to_row(tokenizer, step, rollouts, row, known, split) for row in range(len(rollouts))]
    rows = [row | ({"skipped": number in skipped} if skipped else {}) for number, row in enumerate(rows)]
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def to_row(
    tokenizer: Any, step: int, rollouts: Rollouts, row: int, columns: Mapping[str, Tensor], split: bool
) -> dict[str, Any]:
    """Return what is known of rollout `row`."""
    mask = rollouts.mask[row]
    ids, prompt = rollouts.response_ids[row][mask], rollouts.prompt_ids[row][rollouts.prompt_mask[row]]
    ended = rollouts.evidence.get("sampled_ended", rollouts.ended)
    numbers = {"score": rollouts.scores, "raw_score": rollouts.evidence.get("raw_scores")}
    return {
        "step": step,
        "row": row,
        "prompt": tokenizer.decode(prompt),
        "text": tokenizer.decode(ids),
        **({"tokens": [tokenizer.decode([i]) for i in ids.tolist()]} if split else {}),
        "prompt_ids": prompt.tolist(),
        "response_ids": ids.tolist(),
        "group": int(rollouts.group[row]),
        "ended": None if ended is None else bool(ended[row]),
        **{name: plain_number(float(given[row])) for name, given in numbers.items() if given is not None},
        **{name: [plain_number(v) for v in given[row][mask].float().tolist()] for name, given in columns.items()},
    }


def plain_number(value: float) -> float | str:
    """Return a number as JSON has it; one that is not finite as a text."""
    if math.isfinite(value):
        return round(value, DECIMALS)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
