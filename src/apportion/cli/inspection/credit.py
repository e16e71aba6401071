"""`apportion credit`: the distribution of a reward model's score over the tokens of a text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from apportion import registry
from apportion.cli.arguments import load_value, split_flags
from apportion.cli.terminal import note
from apportion.cli.threads import configure_threads
from apportion.errors import ConfigError, DataError

HELP = """usage: apportion credit --model MODEL --text TEXT [--prompt PROMPT] [options]

Score a text with any reward model and show how its score is apportioned over the tokens.

  --model    a sequence classifier with 1 or 2 labels: a folder or a hub id
  --text     the response to apportion; `-` reads it from standard input
  --prompt   the text that it responds to (input of the model, gets no credit)
  --method   attention, prefix_difference, attribution, shapley, uniform, sparse, or a list; a method with settings:
             '{attention: {mix: 1.0, exclude_self: true}}' (default: [attention, uniform, sparse])
  --json     print one JSON object
  --html     also write a page with a method switch, such as --html credit.html
  --device   auto, cpu, cuda    --dtype  auto, float32, bfloat16    --pad_token  a token to pad with
  --positive_label  the label whose logit raises the score (its name or number), where names do not say which is good

example:
  apportion credit --model runs/demo/reward/final --text "The plot is thin, but the acting is superb."
"""
OPTIONS = ("model", "text", "prompt", "method", "html", "device", "dtype", "pad_token", "positive_label")


def run(arguments: list[str]) -> int:
    """Apportion the score of one text and print it."""
    as_json = "--json" in arguments
    flags, switches = split_flags([a for a in arguments if a != "--json"], [*OPTIONS, "json"])
    if "help" in switches:
        sys.stdout.write(HELP)
        return 0
    options = dict(flags)
    specs = _check(options)
    configure_threads()
    from apportion.models.loading import locate
    from apportion.models.reward import load_reward
    from apportion.stages.explain import apportion_text, text_methods

    methods = text_methods(specs)
    text = sys.stdin.read().rstrip("\n") if options["text"] == "-" else options["text"]
    if not text.strip():
        raise DataError("--text", text, "a text that is not empty", "Write the response to apportion.")
    locate("--model", options["model"])
    settings: dict[str, Any] = {k: options[k] for k in ("device", "dtype", "pad_token") if k in options}
    reward = load_reward(options["model"], field="--model", positive=options.get("positive_label"), **settings)
    for line in reward.notes:
        note(f"note: {line}.")
    prompt, text = once_bos(reward.tokenizer, options.get("prompt", ""), text)
    result = apportion_text(reward, prompt, text, methods, warn=lambda line: note(f"note: {line}."))
    if "html" in options:
        note(f"wrote {write_html(result, options['model'], Path(options['html']).expanduser())}")
    if as_json:
        sys.stdout.write(json.dumps(result._asdict(), ensure_ascii=False) + "\n")
    else:
        show(result)
    return 0


def once_bos(tokenizer: Any, prompt: str, text: str) -> tuple[str, str]:
    """Return prompt and text without a BOS at their start that the tokenizer writes by itself, with a note about it."""
    from apportion.models.text.bos import starts_with_bos, without_bos

    if starts_with_bos(tokenizer, prompt or text):
        note(f"the text begins with {tokenizer.bos_token}, which is written once.")
    return (without_bos(tokenizer, prompt), text) if prompt else ("", without_bos(tokenizer, text))


def _check(options: dict[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """Return the requested methods. Raises ConfigError for missing or invalid options, before anything is loaded."""
    for name, fix in (("model", "Point to a reward model."), ("text", "Write the response to apportion.")):
        if not options.get(name):
            raise ConfigError(f"--{name}", options.get(name), "a value", fix)
    for name, known in (("device", ("auto", "cpu", "cuda")), ("dtype", ("auto", "float32", "bfloat16"))):
        if name in options and options[name] not in known:
            raise ConfigError(f"--{name}", options[name], "one of " + ", ".join(known), "Choose one of them.")
    return registry.parse("--method", load_value("method", options.get("method", "[attention, uniform, sparse]")))


def show(result: Any) -> None:
    """Print the score and each method's heat map."""
    from apportion.report.heatmap import tokens_rich
    from apportion.report.style import credit_limit

    console = Console(highlight=False, markup=False)
    mass = "" if result.kept_mass is None else f"   {result.kept_mass:.0%} of the attention on the text"
    console.print(f"score {result.score:+.3f}   {len(result.tokens)} tokens{mass}")
    for name, values in result.methods.items():
        console.print(f"\n{name}", style="bold")
        console.print(tokens_rich(result.tokens, values, limit=credit_limit(values)))
        best = sorted(range(len(values)), key=lambda i: -abs(values[i]))[:5]
        console.print("   ".join(f"{result.tokens[i]!r} {values[i]:+.3f}" for i in best), style="dim")


def write_html(result: Any, model: str, path: Path) -> Path:
    """Write the page of one text and return its path."""
    from apportion.report.document import write_page
    from apportion.report.heatmap import credit_page

    notes = [f"reward model: {model}"]
    if result.kept_mass is not None:
        notes.append(f"{result.kept_mass:.0%} of the attention falls on the response")
    page = credit_page("Where the score falls", result.prompt, result.tokens, result.methods, result.score, notes)
    return write_page(page, path)
