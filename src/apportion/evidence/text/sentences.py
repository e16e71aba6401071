"""Sentence starts in a text: a rule over punctuation, without a model and without downloads."""

from __future__ import annotations

import re

ENDS = ".!?…。！？｡؟।"
WIDE = "。！？｡"  # end a sentence without a space after them
CLOSERS = "\"'”’»›)]}」』】》〉）］*_"
OPENERS = "\"'“‘«‹([{「『【《〈（［*_"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# titles, which a name follows; in lower case they are ordinary words
TITLES = _words("Mr Mrs Ms Mx Dr Prof St Mt Rev Hon Sen Rep Gov Pres Gen Col Lt Sgt Capt Cmdr Maj Messrs Mme Mlle")
INSIDE = _words("e.g i.e cf vs viz approx")  # never the last word of a sentence
NUMBERED = _words("no nos fig figs vol vols ch chap sec eq eqs p pp art ver para")  # the same before a number
# may be the last word: it is, unless the text continues in lower case or with a number
EITHER = _words(
    "etc al inc ltd co corp llc bros jr sr ca esp resp ed ph.d m.d b.a m.a u.s u.k u.n e.u d.c a.m p.m a.d b.c dept "
    "est ave blvd rd jan feb mar apr jun jul aug sep sept oct nov dec tue tues thu thur thurs fri"
)
STOP = re.compile(rf"[{re.escape(ENDS)}]+[{re.escape(CLOSERS)}]*|\n+")
WORD = re.compile(r"[^\W_]+(?:\.[^\W_]+)*$")
ENUMERATOR = re.compile(r"[\s(\[*#-]*(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,4})")


def sentence_starts(text: str) -> list[int]:
    """Return the offsets of each sentence's first character other than white space, in order.

    A sentence ends after a run of . ! ? … (with the quotes and brackets that close after it) where white space or the
    end follows, after 。！？｡ in any case, and at every line break. A full stop does not end it after a title or
    another abbreviation, an initial, or the number of a list's item; nor after "etc.", "U.S." and their kind, an
    ellipsis or a closing quote, where the text continues in lower case. Decimals, addresses and versions have no space
    after the stop.
    """
    starts: list[int] = []
    begin = 0
    for stop in STOP.finditer(text):
        if _ends_sentence(text, begin, stop):
            _add(starts, text, begin, stop.end())
            begin = stop.end()
    _add(starts, text, begin, len(text))
    return starts


def _add(starts: list[int], text: str, begin: int, end: int) -> None:
    """Add the sentence in text[begin:end], unless it is only white space."""
    body = text[begin:end]
    if body.strip():
        starts.append(begin + len(body) - len(body.lstrip()))


def _ends_sentence(text: str, begin: int, stop: re.Match[str]) -> bool:
    """Return whether the sentence from `begin` ends with `stop`."""
    mark = stop[0]
    if mark[0] == "\n":
        return True
    if any(c in WIDE for c in mark):
        return True
    after = text[stop.end() :]
    if after and not after[0].isspace():
        return False
    rest = after.lstrip()
    if rest[:1] and rest[0] in ENDS:  # ". . .": the last one decides
        return False
    first = rest.lstrip(OPENERS)[:1]
    closed = mark.rstrip(CLOSERS) != mark
    spaced = text[begin : stop.start()].rstrip().endswith(".")  # the last of ". . ."
    if mark.rstrip(CLOSERS) != "." or spaced:
        soft = closed or spaced or "…" in mark or mark.startswith("..")
        return not (soft and first.islower())
    if closed:
        return not first.islower()
    return _stop_ends(text[begin : stop.start()], first)


def _stop_ends(body: str, first: str) -> bool:
    """Return whether one full stop ends the sentence `body`; `first` is the next letter or digit, "" at the end."""
    match = WORD.search(body)
    word = match[0] if match else ""
    lower = word.lower()
    if ENUMERATOR.fullmatch(body):
        return not first
    if word in TITLES or lower in INSIDE or (lower in NUMBERED and first.isdigit()):
        return not first
    if len(word) == 1 and word.isupper() and word != "I":  # J. Smith
        return not first
    if lower in EITHER:
        return not (first.islower() or first.isdigit())
    return True
