"""Checks of an `apportion label` study before it is served; nothing is written."""

from __future__ import annotations

import os
import socket
import statistics
from collections.abc import Callable

from apportion.config import LabelConfig
from apportion.errors import ConfigError, DataError, DiskError
from apportion.label.items import read_items
from apportion.label.server.access import make_access
from apportion.label.server.serve import check_tls, read_guidelines
from apportion.stages.doctor import Case, Check, Finding, run_checks
from apportion.stages.doctor.findings import Result, combine, fail, ok, skip, warn
from apportion.stages.doctor.rl import bad_row_counter, check, with_bad_rows
from apportion.system.paths import local_path

LONG = 4000  # characters of an answer, which take minutes to read
MANY = 8  # answers of an item, which are tiring to order
FEW = 10  # items ranked by several people, whose agreement says little


def access(case: Case) -> Result:
    """The page is on this machine only, or behind a token and https."""
    config: LabelConfig = case.config
    check_tls(config)
    made = make_access(
        "", "", host=config.host, port=config.port, token=config.token, public_url=config.public_url,
        tls=config.tls_certificate is not None, annotators=config.annotators,
    )  # fmt: skip
    names = "anybody chooses a name" if config.annotators is None else f"{len(config.annotators)} names may sign in"
    if not made.public:
        return ok(f"{config.host}, on this machine only; {names}")
    message = f"{config.host}, beyond this machine, with a token; {names}"
    if made.secure:
        return ok(f"{message}; https")
    return warn(f"{message}; unencrypted", "Use --tls_certificate, or a proxy with https and its --public_url.")


def port(case: Case) -> Result:
    """The port is free."""
    config: LabelConfig = case.config
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((config.host, config.port))
        except OSError as error:
            fix = "Use another --port, or stop the program that has this one; --host is an address of this machine."
            return fail(f"{config.host}:{config.port}: {error.strerror or error}", fix)
    return ok(f"{config.port} is free" if config.port else "any free one")


def guidelines(case: Case) -> Result:
    """There are guidelines, a text that can be shown."""
    words = len(read_guidelines(case.config.guidelines).split())
    if words:
        return ok(f"{words} words")
    return warn("none", "Write them in a text file and pass --guidelines: people then agree on what better means.")


def database(case: Case) -> Result:
    """The database can be written to; one that is a URL is left to the server."""
    name = str(case.config.database)
    if "://" in name:
        return skip("a URL: the server connects when it starts")
    path = local_path(name, "database", ConfigError)
    if not path.parent.is_dir():
        return fail(f"{path}: there is no folder {path.parent}", "Make it, or name another --database.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return fail(f"{path}: it cannot be written to", "Name another --database, or change its permissions.")
    return ok(f"{path}, {'which exists: items are added to it' if path.exists() else 'which will be made'}")


def items(case: Case) -> Result:
    """The samples can be read, and every item is one that a person can rank."""
    config: LabelConfig = case.config
    if config.data is None:
        return skip("no --data: the items of the database are served")
    bad = bad_row_counter(config)
    case.texts = found = read_items(config.data, bad=bad, split=config.split)
    counts = [len(one.completions) for one in found]
    sizes = [len(str(text)) for one in found for text in one.completions]
    message = f"{len(found)} items of {min(counts)} to {max(counts)} answers"
    message = f"{message}, {statistics.median(sizes):.0f} characters in the median, {max(sizes)} at most"
    results = [with_bad_rows(ok(message), bad)]
    equal = sum(len(set(map(str, one.completions))) < len(one.completions) for one in found)
    if equal:
        results.append(warn(f"{equal} items have two equal answers", "Sample them again: nobody can rank those."))
    if max(counts) > MANY:
        results.append(warn(f"some of more than {MANY} answers", "Give fewer: people order a few well, many badly."))
    if max(sizes) > LONG:
        results.append(warn(f"some longer than {LONG} characters", "Plan minutes an item, or sample shorter answers."))
    return combine(*results)


def overlap(case: Case) -> Result:
    """Enough items are ranked by several people to measure agreement."""
    config: LabelConfig = case.config
    count, people = len(case.texts), config.overlap_annotators
    if not count:
        return skip("no --data")
    several = round(config.overlap * count)
    message = f"{several} of {count} items go to {people} people: {count + several * (people - 1)} rankings in all"
    if several and config.annotators is not None and len(config.annotators) < people:
        fix = "Lower --overlap_annotators, or name more --annotators."
        return fail(f"{message}; {len(config.annotators)} may sign in", fix)
    return ok(message) if several >= FEW else warn(message, "Agreement on so few says little: raise --overlap.")


CHECKS: tuple[Check, ...] = (
    check("access", access, error=ConfigError),
    check("port", port, "access", error=ConfigError),
    check("guidelines", guidelines, error=ConfigError),
    check("database", database, error=DiskError),
    check("items", items, error=DataError, opens=True),
    check("overlap", overlap, "items", error=ConfigError),
)


def check_label(config: LabelConfig, *, on_check: Callable[[str], None] = lambda name: None) -> list[Finding]:
    """Return the findings of all checks for `apportion label` with these settings."""
    return run_checks(Case(config), CHECKS, on_check)
