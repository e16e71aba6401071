"""The answers of everyone side by side, a few prompts a page, each with a link to its token heat map."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from apportion.report.comparison.read import Comparison
from apportion.report.comparison.tables import title_of
from apportion.report.style import finite, number

MOST = 200  # prompts on the page
PER_PAGE = 4


def samples_html(found: Comparison) -> str:
    """Return the first answer of everyone to each prompt, with controls that comparison.js fills."""
    count = min(len(found.samples), MOST)
    if not count:
        return ""
    blocks = "".join(_block(found, i) for i in range(count))
    orders = ['<option value="">in file order</option>']
    for i, name in enumerate(found.everyone[1:], 1):
        orders.append(f'<option value="{i} -1">largest gain of {escape(name)}</option>')
        orders.append(f'<option value="{i} 1">largest loss of {escape(name)}</option>')
    pager = (
        f'<div class="pager" data-pager data-size="{PER_PAGE}" hidden>'
        f"<label>Order <select data-order>{''.join(orders)}</select></label>"
        '<span class="buttons"><button type="button" data-previous>Previous</button>'
        '<output data-where aria-live="polite"></output>'
        '<button type="button" data-next>Next</button></span></div>'
    )
    note = f"The first answer to each of the first {count} of {len(found.samples)} prompts"
    note += f"; gains and losses are in {title_of(found.main)}, against the start."
    return f'<p class="note">{note}</p>{pager}<div data-samples>{blocks}</div>'


def _block(found: Comparison, place: int) -> str:
    row = found.samples[place]
    cells = [_cell(found, row, i, name, place) for i, name in enumerate(found.everyone)]
    gains = " ".join(_gain(found, row, name) for name in found.everyone)
    return (
        f'<article class="compared" id="prompt-{place + 1}" data-gains="{gains}">'
        f'<header><h3>Prompt {place + 1}</h3><p class="model-text prompt" tabindex="0">'
        f"{escape(prompt_text(row['prompt']))}</p></header>"
        f'<div class="sample count-{len(cells)}">{"".join(cells)}</div></article>'
    )


def _cell(found: Comparison, row: Mapping[str, Any], i: int, name: str, place: int) -> str:
    one = row["policies"][name]
    text = str(one["completions"][0]) if one["completions"] else ""
    facts = [(title_of(key), _first(one["scores"].get(key))) for key in found.figures["measures"]]
    ratios = (one.get("log_ratios") or [None])[0]
    kl = sum(ratios) if isinstance(ratios, list) and all(finite(x) is not None for x in ratios) else None
    facts += [("log-ratio", kl)] if kl is not None else []
    details = " ".join(f"<span>{label} <b>{number(finite(value))}</b></span>" for label, value in facts)
    tokens = _first(one.get("tokens"))
    cut = " · cut off" if _first_of(one.get("ended")) is False else ""
    details += f" <span><b>{tokens:,.0f}</b> tokens{cut}</span>" if tokens is not None else ""
    link = ""
    if (place, name) in found.credit:
        link = f'<p class="more"><a href="{heat_map_file(place)}#policy-{i}">Token heat map</a></p>'
    shown = escape(text) if text.strip() else '<span class="prompt">(no text)</span>'
    return (
        f'<div class="cell run-{i}"><h4><i class="dot"></i>{escape(name)}</h4><p class="facts">{details}</p>'
        f'<p class="model-text answer" tabindex="0">{shown}</p>{link}</div>'
    )


def heat_map_file(place: int) -> str:
    """Return the page with the token heat maps of the prompt at `place`, beside the page of the comparison."""
    return f"tokens/prompt-{place + 1:04d}.html"


def prompt_text(prompt: Any) -> str:
    """Return a prompt as text, a conversation with its roles."""
    if isinstance(prompt, list):
        return "\n\n".join(f"{turn.get('role')}: {_content(turn.get('content'))}" for turn in prompt)
    return str(prompt)


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


def _gain(found: Comparison, row: Mapping[str, Any], name: str) -> str:
    """Return the difference to the start in the main measure, "x" where there is none."""
    own, start = (_first(row["policies"][one]["scores"].get(found.main)) for one in (name, found.everyone[0]))
    return "x" if own is None or start is None else f"{own - start:.6g}"


def _first_of(values: Any) -> Any:
    return values[0] if isinstance(values, list) and values else None


def _first(values: Any) -> float | None:
    return finite(_first_of(values))
