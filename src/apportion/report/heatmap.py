"""Token heat maps: HTML, rich text for the terminal, and a page for one text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from rich.style import Style
from rich.text import Text

from apportion.report.document import asset, document
from apportion.report.rollouts import pack
from apportion.report.style import FAINT, blend, credit_limit, finite, is_special, level, number, scale_limit, shown

CAUTION = (
    "A heat map shows where a credit method puts the reward. It is not an explanation of the reward model or of the "
    "policy, and a token with much credit did not necessarily cause the score."
)


def tokens_html(
    tokens: Sequence[str], values: Sequence[float | None], *, limit: float | None = None, label: str = "value"
) -> str:
    """Return tokens as HTML spans, coloured by value; needs the stylesheet heatmap.css.

    Args:
        tokens: n tokens as text, leading spaces and newlines included; any text is safe.
        values: n numbers; missing or non-finite ones are drawn with a dotted underline and no colour.
        limit: the value with the strongest colour; the largest absolute value when None.
        label: what the values are, for the tooltip.
    """
    limit = scale_limit(values) if limit is None else limit
    padded = [*values, *[None] * (len(tokens) - len(values))]
    spans = [_span(i, t, v, limit, label) for i, (t, v) in enumerate(zip(tokens, padded, strict=False))]
    return f'<div class="tokens">{"".join(spans)}</div>'


def _span(index: int, token: str, value: float | None, limit: float, label: str) -> str:
    position = level(value, limit)
    classes = ["token", "negative" if position < 0 else "positive"]
    if finite(value) is None:
        classes.append("missing")
    if is_special(token):
        classes.append("special")
    tip = f"{label} {number(finite(value), signed=True)} (token {index + 1})"
    style = f"--level:{abs(position):.3f}"
    return f'<span class="{" ".join(classes)}" style="{style}" title="{escape(tip)}">{escape(shown(token))}</span>'


def tokens_rich(tokens: Sequence[str], values: Sequence[float | None], *, limit: float | None = None) -> Text:
    """Return tokens as coloured text for the terminal: n tokens, n values, the scale as in `tokens_html`."""
    limit = scale_limit(values) if limit is None else limit
    text = Text()
    for i, token in enumerate(tokens):
        position = level(values[i] if i < len(values) else None, limit)
        style = Style(color="#141414", bgcolor=blend(position)) if abs(position) >= FAINT else Style()
        text.append(shown(token), style=style)
    return text


def stack_html(tokens: Sequence[str], methods: Mapping[str, Sequence[float | None]]) -> str:
    """Return the heat maps of all methods for the same text, one below the other, each on its own scale."""
    rows = []
    for name, values in methods.items():
        total = number(sum(v for v in map(finite, values) if v is not None))
        head = f'<h4>{escape(name)}</h4><p class="facts">sum {total}</p>'
        tokens_part = tokens_html(tokens, values, limit=credit_limit(values), label=name)
        rows.append(f'<div class="stack-row"><header>{head}</header>{tokens_part}</div>')
    return "".join(rows)


def viewer_html(stack: str = "") -> str:
    """Return the viewer's skeleton, which heatmap.js fills; without JavaScript, `stack` is shown."""
    return f"""<div class="viewer" data-viewer>
<div class="picker" data-picker hidden>
<label data-run-field>Run <select data-run></select></label>
<label class="grow">Step <output data-step-text></output>
<input type="range" min="0" value="0" step="1" data-step></label>
<span class="buttons"><button type="button" data-first>First</button>
<button type="button" data-last>Last</button></span>
<label data-row-field>Rollout <select data-row></select></label>
</div>
<div class="switches" data-switches></div>
<div class="stage">
<div class="stage-head"><p class="facts" data-facts></p><div class="scale" aria-hidden="true"><span data-low></span>
<i></i><span data-high></span></div></div>
<p class="model-text prompt" data-prompt></p>
<div class="tokens main" data-tokens tabindex="0" role="group"
 aria-label="Response tokens; left and right arrow keys read the value of each"></div>
<p class="readout" data-readout aria-live="polite"></p>
</div>
<div class="stack-block" data-stack-block>
<div class="stack-title"><h3>What each method would have given the same text</h3>
<label class="check"><input type="checkbox" data-shared> one colour scale for all</label></div>
<div class="stack" data-stack>{stack}</div>
</div>
<details data-values><summary>Values as a table</summary><div class="scroll" data-table></div></details>
</div>"""


def credit_page(
    title: str,
    prompt: str,
    tokens: Sequence[str],
    methods: Mapping[str, Sequence[float]],
    score: float | None,
    notes: Sequence[str] = (),
) -> str:
    """Return a self-contained HTML page that shows how each method spreads one score over one text.

    Args:
        title: the page's heading.
        prompt: the text before the response; may be empty.
        tokens: n response tokens as text.
        methods: method name -> n numbers, the reward on each token.
        score: the score that was spread, or None.
        notes: sentences to show under the heat maps (models used, warnings).
    """
    remarks = "".join(f"<p>{escape(note)}</p>" for note in [*notes, CAUTION])
    body = f"""<header class="top"><p class="kicker">apportion credit</p><h1>{escape(title)}</h1></header>
<main>
<section class="first" aria-label="Token heat map">{viewer_html(stack_html(tokens, methods))}</section>
<section class="prose"><h2>Notes</h2>{remarks}</section>
</main>"""
    rollout = pack(prompt, tokens, quantities={}, methods=methods, score=score)
    data = {"rollout-data": [{"name": title, "steps": [{"step": 0, "rollouts": [rollout]}]}]}
    styles = [asset("base.css"), asset("heatmap.css")]
    return document(title, body, data=data, styles=styles, scripts=[asset("heatmap.js")])
