"""Words of a private dialect, each with the field's word: `python tools/words.py [PATH ...] [--count]` lists uses.

Identifiers are looked up among the names of Python code, module names among the files of `src`, phrases in prose: the
comments and strings of Python code, YAML comments and Markdown. LOG.md, which is dated, stays as it was written.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "tests", "benchmarks", "studies", "tools", "examples", "docs", "recipes")
ROOT_FILES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
EXEMPT = frozenset({"tools/words.py"})  # it has to spell them

MODULES = {  # file names, without .py
    "alarm": "error_relay",
    "contenders": "candidates",
    "cores": "cpu",
    "deadline": "time_limit",
    "guards": "monitors",
    "keeper": "session",
    "lean": "norms",
    "masters": "master_weights",
    "own_methods": "user_code",
    "own_tokenizer": "text/render",
    "packed": "onednn",
    "plain_yaml": "safe_yaml",
    "randomness": "rng",
    "refusals": "compatibility",
    "skips": "nonfinite",
    "stopped": "crash_dump",
    "surroundings": "reproducibility",
    "text_credit": "explain",
    "token_text": "text/token_spans",
}
IDENTIFIERS = {  # whole names; an entry in parentheses is a regular expression
    "announce": "warn",
    "ask": "request, prompt, or EvidenceKey",
    "asked": "requested",
    "came": "got",
    "contenders": "candidates",
    "Contender": "Candidate",
    "drawing": "draw",
    "from_main": "broadcast_object",
    "Held": "Checkpointable",
    "keeping": "training_session",
    "Keeper": "TrainingSession",
    "know": "update_status",
    "later": "lazy_columns",
    "learned": "trained, or the state's name",
    "learned_once": "single_step_on_policy",
    "look": "check",
    "(_?mend(s|ed|ing)?)": "fix",
    "own_methods": "user_code",
    "own_tokenizer": "render",
    "parted": "is_sharded",
    "(_?patiently)": "retry_when_full",
    "plain_yaml": "safe_yaml",
    "refusals": "compatibility",
    "relearn": "load_state_dict",
    "(_?said)": "message, result, text",
    "Said": "Result",
    "say": "warn, write",
    "Scene": "BatchSnapshot",
    "(_?settle)": "configure_threads, resolve_defaults",
    "settled": "threads, resolved",
    "settle_truncated": "apply_truncation",
    "speaks": "is_log_rank",
    "sum_over": "all_reduce_sum",
    "surroundings": "reproducibility",
    "tell": "on_step, on_progress",
    "Tell": "ProgressCallback",
    "text_credit": "explain",
    "tighten": "raise_kl_coef",
    "together": "combined, in_batch; error_barrier",
    "token_text": "token_spans",
    "told": "reported, messages",
    "Track": "MetricHistory",
    "Trainee": "RewardLearner",
    "Watch": "Monitor",
    "Writer": "StepModel",
    "((attribution|implicit|policy|process|reference|reward|shapley|vine)_pass)": "the producer's name",
}
PHRASES = {  # regular expressions; a space stands for any white space
    r"mend(s|ed|ing)?": "fix",
    r"go on|goes on|going on|went on|gone on": "continue, resume",
    r"of the user's|of a user's|of users'": "user-supplied",
    r"of yours|of theirs": "your …, their …",
    r"at hand": "current",
    r"anew": "again",
    r"(left|leaves?|leaving) behind": "saved, saves",
    r"last bits": "bitwise",
    r"(written|writes?|writing|wrote) down": "logged, recorded",
    r"in parts": "sharded",
    r"what came": "the value, the result",
    r"told by name": "named",
    r"(put|puts|putting) right": "fix",
    r"(is|are|was|were|be) said": "is reported, is printed",
    r"(is|are|was|were|be|been) told(?! apart)": "is reported, is passed",
    r"tells? of": "describes, reports",
    r"as was said|it is said": "as stated",
    r"deals? out|dealt out": "split across",
    r"(the )?policy (never |can |may |would |could )?writes?": "the policy generates",
    r"models? reads?|model that reads": "the model scores, the model encodes",
    r"told what": "given",
    r"asked for anew": "requested again",
}
ATTRIBUTES = frozenset({"later", "look"})  # ordinary words, except as attributes
WHAT = "a noun phrase that says what is in the module"


class Use(NamedTuple):
    """One use of a word of the dialect: where, which, and what to write instead."""

    path: str
    line: int
    word: str
    instead: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.word!r}: write {self.instead}"


def compiled(words: dict[str, str]) -> list[tuple[re.Pattern[str], str]]:
    """Return (pattern, replacement) of each phrase, at word boundaries."""
    spaced = {phrase.replace(" ", r"\s+"): to for phrase, to in words.items()}
    return [(re.compile(rf"\b(?:{phrase})\b", re.IGNORECASE), to) for phrase, to in spaced.items()]


PHRASE_PATTERNS = compiled(PHRASES)
NAME_PATTERNS = [(re.compile(n[1:-1]), to) for n, to in IDENTIFIERS.items() if n.startswith("(")]
ANY_PHRASE = re.compile("|".join(pattern.pattern for pattern, _ in PHRASE_PATTERNS), re.IGNORECASE)
# Python code without any of these, whatever stands between the words of a phrase, need not be taken apart (slow)
_BETWEEN = r"(?:\W|\b[A-Za-z]{1,2}(?=['\"]))+"
SUSPICIOUS = re.compile(
    rf"\b(?:{'|'.join([*IDENTIFIERS, *(phrase.replace(' ', _BETWEEN) for phrase in PHRASES)])})\b", re.IGNORECASE
)


def files() -> Iterator[Path]:
    """Yield every file that is checked, in order."""
    found = [ROOT / name for name in ROOT_FILES]
    for folder in FOLDERS:
        found += sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md", ".yaml", ".yml"))
    yield from (p for p in found if p.is_file() and p.relative_to(ROOT).as_posix() not in EXEMPT)


def uses(path: Path, root: Path = ROOT) -> list[Use]:
    """Return the uses of the dialect in one file below `root`, in the order of their lines."""
    name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
    found: list[Use] = []
    if path.suffix == ".py":
        found += (
            [Use(name, 1, path.stem, MODULES[path.stem])] if name.startswith("src/") and path.stem in MODULES else []
        )
        if "What " in text and (ast.get_docstring(ast.parse(text)) or "").startswith("What "):
            found.append(Use(name, 1, "What …", WHAT))
        if not SUSPICIOUS.search(text):
            return sorted(found)
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        found += [Use(name, line, word, to) for line, word, to in identifiers(tokens)]
        text = prose(text, tokens)
    elif path.suffix in (".yaml", ".yml"):
        text = "\n".join(line.partition("#")[2] for line in text.split("\n"))
    for pattern, to in PHRASE_PATTERNS if ANY_PHRASE.search(text) else ():
        for match in pattern.finditer(text):
            found.append(Use(name, text.count("\n", 0, match.start()) + 1, " ".join(match.group().split()), to))
    return sorted(found)


def identifiers(tokens: list[tokenize.TokenInfo]) -> Iterator[tuple[int, str, str]]:
    """Yield (line, name, replacement) of the names of the dialect; `file.tell` is Python's own."""
    before = ""
    for token in tokens:
        wanted = before == "." if token.string in ATTRIBUTES else token.string != "tell" or before != "."
        if token.type == tokenize.NAME and wanted:
            to = IDENTIFIERS.get(token.string) or next((t for p, t in NAME_PATTERNS if p.fullmatch(token.string)), None)
            if to is not None:
                yield token.start[0], token.string, to
        before = token.string


PROSE = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1))
MARKS = re.compile(r"^[#]|^[A-Za-z]{0,2}(?=['\"])|['\"]")


def prose(text: str, tokens: list[tokenize.TokenInfo]) -> str:
    """Return `text` with its code blanked out: comments and strings stay where they are, on their lines.

    Marks of comments and quotes become spaces, so that a phrase may run over lines; code becomes NUL, so that it may
    not run over code.
    """
    lines = text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    shown, done = [], 0
    for token in tokens:
        if token.type not in PROSE:
            continue
        first = starts[token.start[0] - 1] + token.start[1]
        last = starts[token.end[0] - 1] + token.end[1]
        shown.append(re.sub(r"\S", "\0", text[done:first]))
        shown.append(MARKS.sub(lambda m: " " * len(m.group()), text[first:last]))
        done = last
    return "".join([*shown, re.sub(r"\S", "\0", text[done:])])


def main(arguments: list[str] | None = None) -> int:
    """Print every use, or their number by folder, and return 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="*", help="files or folders (default: the whole project)")
    parser.add_argument("--count", action="store_true", help="print numbers by folder")
    given = parser.parse_args(arguments)
    chosen = [(ROOT / path).resolve() for path in given.paths]
    found = [use for p in files() if not chosen or any(p == c or c in p.parents for c in chosen) for use in uses(p)]
    if given.count:
        counted = Counter(use.path.rpartition("/")[0] or "." for use in found)
        print("\n".join(f"{count:5d} {folder}" for folder, count in sorted(counted.items())))
    else:
        print("\n".join(map(str, found)))
    print(f"{len(found)} words of the dialect")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
