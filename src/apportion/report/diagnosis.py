"""The panel of `apportion diagnose`: the direction of each credit method's gradient, one line a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from apportion.report.read import RunData
from apportion.report.style import interval, number
from apportion.report.summary import Card, Line, card_html

CARDS = (
    Card("Cosine", "of the expected policy gradient with the true one", None, "cosine"),
    Card("Bias", "norm of the difference from the true gradient, over its norm", None, "bias"),
    Card("Useful signal", "along the true gradient, over the noise of one batch", None, "useful_snr"),
    Card("Stop bias", "added to the gradient of the EOS logit", None, "stop_bias"),
)
COLUMNS: Mapping[str, str] = {
    "credit/kept_mass": "kept mass",
    "credit/share_entropy": "entropy, nats",
    "length_correlation": "r(last reward, length)",
    "extra_ms": "extra ms a batch",
    "extra_forwards": "extra forwards",
    "extra_backwards": "extra backwards",
}
PROSE = (
    "All methods apportion the same rollouts. The gradient is that of a linear map on the policy's last hidden states; "
    "the true one weights each response by its score minus the mean of the prompt's other responses. Products of "
    "expectations leave out the pairs of a prompt with itself, so noise does not bias them; 95% intervals are "
    "bootstrapped over prompts. A dash marks a figure that is within the noise, or that does not apply."
)


def widest(runs: Sequence[RunData]) -> int:
    """Return the largest number of methods in a diagnosis among `runs`."""
    return max((len(run.diagnosis.get("methods", {})) for run in runs), default=0)


def diagnosis_html(runs: Sequence[RunData]) -> str:
    """Return the panels of the diagnoses among `runs`; empty where there are none."""
    diagnoses = [run for run in runs if run.diagnosis.get("methods")]
    panels = [_panel(run.diagnosis, run.name if len(diagnoses) > 1 else "") for run in diagnoses]
    return "".join(panels) + f'<p class="note">{escape(PROSE)}</p>' if panels else ""


def _panel(diagnosis: Mapping[str, Any], name: str) -> str:
    methods: Mapping[str, Mapping[str, Any]] = diagnosis["methods"]
    cards = [card_html(card, lines, True) for card in CARDS if (lines := _lines(methods, card))]
    verdicts = "".join(f"<li><b>{escape(m)}</b>: {escape(str(v.get('verdict', '')))}.</li>" for m, v in methods.items())
    chosen = escape(str(diagnosis.get("recommended") or "Nothing to recommend"))
    head = f"<h3>{escape(name)}</h3>" if name else ""
    rollouts, prompts, batch = (diagnosis.get(key) for key in ("rollouts", "prompts", "batch"))
    size = f"{rollouts} rollouts of {prompts} prompts, batches of {batch}"
    return (
        f'{head}<div class="prose"><p><b>{chosen}</b>: {escape(str(diagnosis.get("why", "")))} ({escape(size)}).</p>'
        f'<ul>{verdicts}</ul></div><div class="cards count-{len(cards)}">{"".join(cards)}</div>{_table(methods)}'
    )


def _lines(methods: Mapping[str, Mapping[str, Any]], card: Card) -> list[Line]:
    lines: list[Line] = []
    for i, (name, measured) in enumerate(methods.items()):
        value = interval(measured.get(card.after))
        if value is not None:
            lines.append((i, name, None, value))
    return lines


def _table(methods: Mapping[str, Mapping[str, Any]]) -> str:
    heads = "".join(f'<th scope="col">{escape(title)}</th>' for title in COLUMNS.values())
    rows = []
    for name, measured in methods.items():
        cells = "".join(f"<td>{_cell(measured.get(key))}</td>" for key in COLUMNS)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return f'<div class="scroll"><table class="diagnosis"><tr><th></th>{heads}</tr>{"".join(rows)}</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return str(value)
    measured = interval(value)
    return number(None if measured is None else measured.mean)
