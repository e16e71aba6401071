"""`apportion label`: serve the page where people rank answers, and export, import or draw what they ranked."""

from __future__ import annotations

import signal
import sys
from typing import TypeVar

from apportion.cli.arguments import Parsed, parse, show
from apportion.cli.terminal import note
from apportion.config import LabelConfig, LabelExportConfig, LabelImportConfig, LabelResultsConfig
from apportion.config.schema.section import Section
from apportion.errors import ConfigError, Interrupted, unknown_name

C = TypeVar("C", bound=Section)

SERVE = """commands:
  apportion label [settings]            serve the page
  apportion label export [settings]     rankings of a database as a file, or as TRL's pairs
  apportion label import [settings]     rankings of Label Studio or Argilla as a file
  apportion label results [settings]    agreement, progress and biases on a page
  `apportion label COMMAND --help` lists the settings of each.

examples:
  apportion label --data samples.jsonl
  apportion label --data samples.jsonl --guidelines guidelines.md --overlap 0.2
  APPORTION_LABEL_TOKEN=$(openssl rand -hex 16) apportion label --data samples.jsonl --host 0.0.0.0
  apportion label --database postgresql://labels@db/labels
"""
EXPORT = """examples:
  apportion label export --output rankings.jsonl
  apportion label export --form pairs --output pairs.parquet
"""
IMPORT = """examples:
  apportion label import --source project-1.json
  apportion label import --source records.jsonl --format argilla --prompt instruction
"""
RESULTS = """example:
  apportion label results --database labels.db --output labels.html
"""


def run(arguments: list[str]) -> int:
    """Run a command of `apportion label`; without one, serve the page."""
    commands = {"export": _export, "import": _import, "results": _results}
    if not arguments or arguments[0].startswith("-"):
        return _serve(arguments)
    if arguments[0] not in commands:
        raise unknown_name("command", f"label {arguments[0]}", [f"label {name}" for name in commands])
    return commands[arguments[0]](arguments[1:])


def _parsed(kind: type[C], command: str, arguments: list[str], examples: str) -> Parsed[C] | None:
    """Return the settings; None where they were only to be shown."""
    parsed = parse(kind, command, arguments, examples)
    if parsed.fresh:
        fix = "Name another --database or --output; rankings are never removed."
        raise ConfigError("--fresh", "given", "no such switch: rankings are kept", fix)
    if parsed.dry_run:
        sys.stdout.write(show(parsed.config))
        return None
    return parsed


def _serve(arguments: list[str]) -> int:
    parsed = _parsed(LabelConfig, "label", arguments, SERVE)
    if parsed is None:
        return 0
    from apportion.label.server.serve import addresses, is_ranked, open_study, serve

    opened = open_study(parsed.config)
    page, results = addresses(parsed.config, opened)

    def started() -> None:
        for line in opened.lines:
            note(line)
        sys.stdout.write(f"page     {page}\nresults  {results}\n")
        sys.stdout.flush()
        share = parsed.config.until_ranked
        end = "" if share is None else f" It ends by itself when {share:.0%} of the items are ranked."
        note(f"Press Ctrl-C to stop; every ranking is saved at once.{end}")

    numbers = serve(parsed.config, opened, started)
    share = parsed.config.until_ranked
    if share is not None and not is_ranked(numbers, share):
        raise Interrupted(f"{numbers['closed']} of {numbers['items']} items ranked, all saved.", 128 + signal.SIGINT)
    return 0


def _export(arguments: list[str]) -> int:
    parsed = _parsed(LabelExportConfig, "label export", arguments, EXPORT)
    if parsed is None:
        return 0
    config = parsed.config
    from apportion.label.export import pair_rows, ranking_rows
    from apportion.label.files import output_path, write_rows
    from apportion.label.store import open_store

    if config.form == "pairs" and config.replaced:
        raise ConfigError("replaced", True, "false with form: pairs", "Export them as rankings.")
    path = output_path(config.output)
    store = open_store(config.database)
    try:
        rows = ranking_rows(store, every=config.replaced)
        if config.form == "pairs":
            rows = pair_rows(store, best_worst=config.pairs == "best_worst")
        number = write_rows(path, rows)
    finally:
        store.close()
    note(f"{number} {config.form}")
    sys.stdout.write(f"{path}\n")
    return 0


def _import(arguments: list[str]) -> int:
    parsed = _parsed(LabelImportConfig, "label import", arguments, IMPORT)
    if parsed is None:
        return 0
    config = parsed.config
    from apportion.data.bad_rows import leaving_out
    from apportion.label.files import output_path, write_rows
    from apportion.label.importing import import_rankings

    path = output_path(config.output)
    with leaving_out(path.parent, config.skip_bad_rows, f"{path.name}.bad_rows.jsonl") as bad:
        number = write_rows(path, import_rankings(config, bad))
    note(f"{number} rankings")
    sys.stdout.write(f"{path}\n")
    return 0


def _results(arguments: list[str]) -> int:
    parsed = _parsed(LabelResultsConfig, "label results", arguments, RESULTS)
    if parsed is None:
        return 0
    config = parsed.config
    from pathlib import Path

    from apportion.label.results.page import results_page
    from apportion.label.store import open_store
    from apportion.report.document import write_page

    store = open_store(config.database)
    try:
        html, _ = results_page(store, config.database if "://" not in config.database else "rankings")
    finally:
        store.close()
    sys.stdout.write(f"{write_page(html, Path(config.output))}\n")
    return 0
