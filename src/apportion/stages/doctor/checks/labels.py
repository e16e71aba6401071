"""Checks of a reward model's training data: its labels, and the length of its excerpts."""

from __future__ import annotations

from collections.abc import Sequence

from apportion.models.loading import pick_device
from apportion.stages.doctor.case import Case
from apportion.stages.doctor.checks.machine import GB, free_memory, weights_of
from apportion.stages.doctor.checks.prompts import keys
from apportion.stages.doctor.checks.tokens import embedded
from apportion.stages.doctor.findings import Result, fail, grade, ok, warn

MANY = 2000  # texts whose lengths are measured


def balance(case: Case) -> Result:
    """Both labels are common in the training and in the held-out texts."""
    messages, shares = [], []
    for name, rows in (("training", case.training or ()), ("held-out", case.held_out or ())):
        positive = sum(row.label for row in rows)
        messages.append(f"{positive} of {len(rows)} {name} texts are positive")
        shares.append(positive / max(1, len(rows)))
    if not 0.0 < shares[1] < 1.0:
        return fail("; ".join(messages), "Give held-out texts of both kinds, or accuracy and statistics mean nothing.")
    if not all(0.1 <= share <= 0.9 for share in shares):
        return warn(
            "; ".join(messages), "Give more texts of the rarer kind: accuracy overrates a model that never predicts it."
        )
    return ok("; ".join(messages))


def repeated(case: Case) -> Result:
    """Training texts are distinct."""
    rows = case.training or ()
    count = len(rows) - len(set(keys(row.text for row in rows)))
    labels: dict[str, set[int]] = {}
    for key, row in zip(keys(row.text for row in rows), rows, strict=True):
        labels.setdefault(key, set()).add(row.label)
    contradictory = sum(len(given) > 1 for given in labels.values())
    message = f"{count} of {len(rows)} training texts repeat another, {contradictory} with the other label"
    if contradictory > 0.01 * len(rows):
        return fail(message, "Drop those texts, or one of their labels: nothing can be learned from both.")
    if contradictory:
        return warn(message, "Drop those texts, or one of their labels: nothing can be learned from both.")
    return warn(message, "Drop the repeated rows.") if count > 0.01 * len(rows) else ok(message)


def vocabulary(case: Case) -> Result:
    """Every id of the texts and every special token has an embedding."""
    return embedded(case.tokenizer, int(case.policy_settings.get_text_config().vocab_size), rows_of(case), "model")


def rows_of(case: Case) -> Sequence[Sequence[int]]:
    """Return the ids of the first `MANY` training texts, cut beyond the longest excerpt."""
    if not case.rows:
        texts = [row.text[: 400 * case.config.excerpt_tokens[1]] for row in (case.training or ())[:MANY]]
        case.rows = case.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return case.rows


def excerpts(case: Case) -> Result:
    """Excerpts fit into the model's context, and texts are long enough for them."""
    low, high = case.config.excerpt_tokens
    lengths = [len(ids) for ids in rows_of(case)]
    short = sum(length < low for length in lengths)
    message = f"excerpts of {low} to {high} tokens, context {case.context}; {short} of {len(lengths)} texts are shorter"
    if high > case.context:
        return fail(message, "Lower the second number of excerpt_tokens.")
    if short > 0.1 * len(lengths):
        return warn(message, "Lower the first number of excerpt_tokens, or give longer texts.")
    return ok(message)


def memory(case: Case) -> Result:
    """The weights, their gradients and the optimizer state fit into free memory."""
    count = weights_of(case, "policy")
    each = 4 if case.config.lora.rank else 16
    need, free = 0.7 * GB + each * count, free_memory(pick_device(case.config.device))
    message = f"at least {need / GB:.2g} GB of {free / GB:.3g} GB free"
    return grade(need / free, (0.8, 1.2), message, "Train adapters (lora.rank 16), or a smaller model.")
