"""Checks of a reward model's training data: its labels, and the length of its excerpts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from apportion.models.loading import embeddings_of, pick_device
from apportion.models.text.bos import added_bos, special_around
from apportion.models.text.labelled import token_rows
from apportion.stages.doctor.case import Case
from apportion.stages.doctor.checks.machine import GB, free_memory, weights_of
from apportion.stages.doctor.checks.prompts import keys
from apportion.stages.doctor.checks.tokens import embedded
from apportion.stages.doctor.findings import Result, fail, grade, ok, warn

MANY = 2000  # texts whose lengths are measured


def balance(case: Case) -> Result:
    """Both labels are common in the training and in the held-out texts; preference pairs have both."""
    if case.training and case.training[0].paired:
        return ok(f"{len(case.training) // 2} training pairs, {len(case.held_out or ()) // 2} held-out pairs")
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


def rankings(training: Sequence[int], held_out: Sequence[int]) -> Result:
    """Check that rankings have pairs, given the number of each one's."""
    silent = sum(count == 0 for count in training)
    message = f"{len(training)} training rankings with {sum(training)} pairs, {len(held_out)} held-out rankings with "
    message += f"{sum(held_out)}; {silent} have no pair (all tied, or not judged)"
    if not sum(training) or not sum(held_out):
        return fail(message, "Give more rankings, of several prompts, or held-out ones with --test_data.")
    if silent > 0.1 * len(training):
        return warn(message, "Drop them; of ties `preferences.ties half` learns that they are equal.")
    return ok(message)


def repeated(case: Case) -> Result:
    """Training texts, or preference pairs, are distinct."""
    rows = case.training or ()
    if rows and rows[0].paired:
        return repeated_pairs(list(keys(row.text for row in rows)))
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


def repeated_pairs(texts: Sequence[str]) -> Result:
    """Check that pairs, chosen and rejected text in turn, are distinct; one text may be in several pairs."""
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    count, known = len(pairs) - len(set(pairs)), set(pairs)
    swapped = sum((rejected, chosen) in known for chosen, rejected in pairs)
    message = f"{count} of {len(pairs)} pairs repeat another, {swapped} are also there the other way round"
    if swapped:
        fix = "Drop one of the two: nothing can be learned from both."
        return (fail if swapped > 0.01 * len(pairs) else warn)(message, fix)
    return warn(message, "Drop the repeated rows.") if count > 0.01 * len(pairs) else ok(message)


def vocabulary(case: Case) -> Result:
    """Every id of the texts and every special token has an embedding."""
    return embedded(case.tokenizer, embeddings_of(case.policy_folder, case.policy_settings), rows_of(case), "model")


def rows_of(case: Case) -> Sequence[Sequence[int]]:
    """Return the ids of the first `MANY` training texts, cut beyond the longest excerpt."""
    if not case.rows:
        config = case.config
        longest = config.preferences.max_tokens if case.notes.get("rankings") else config.excerpt_tokens[1]
        case.rows, case.notes["prompts"] = token_rows((case.training or ())[:MANY], case.tokenizer, longest)
    return case.rows


def text_ids(case: Case) -> Result:
    """Texts hold no pad token and hardly any unknown token."""
    tokenizer, rows = case.tokenizer, rows_of(case)
    counted = Counter(i for row in rows for i in row)
    total = max(1, sum(counted.values()))
    chosen = case.config.pad_token
    pad = tokenizer.pad_token_id if chosen is None else tokenizer.convert_tokens_to_ids(chosen)
    pads, unknown = counted[pad], counted[tokenizer.unk_token_id] if tokenizer.unk_token_id is not None else 0
    ends = counted[tokenizer.eos_token_id]
    message = f"{pads} pad, {ends} EOS and {unknown} unknown of {total} tokens of the texts"
    if pads:
        fix = "An excerpt that ends with the pad token is scored before it: remove it, or pass another --pad_token."
        return warn(message, fix)
    if unknown > 0.01 * total:
        return warn(message, "The model's tokenizer does not know this script: use other texts, or another model.")
    return ok(message)


def beginning(case: Case) -> Result:
    """Texts begin with one BOS where the tokenizer adds it, and rendered conversations too."""
    bos = added_bos(case.tokenizer)
    if not bos:
        return ok("the tokenizer adds no BOS token")
    rows = [*(case.training or ()), *(case.held_out or ())]
    count = sum(row.text.startswith(bos) for row in rows)
    lacking = sum(row.rendered and not row.text.startswith(bos) for row in rows)
    message = f"BOS {bos!r} begins {count} of {len(rows)} texts, and is written once in all"
    if not lacking:
        return ok(message)
    message = f"BOS {bos!r} begins {count} of {len(rows)} texts; {lacking} rendered ones have none"
    return warn(message, "Let the chat template begin with {{ bos_token }}, as the tokenizer does for plain text.")


def excerpts(case: Case) -> Result:
    """Excerpts fit into the model's context, behind their prompts, and texts are long enough for them."""
    rows = rows_of(case)
    if case.notes.get("rankings"):
        return whole(case, rows)
    low, high = case.config.excerpt_tokens
    prompts = case.notes["prompts"]
    longest, lengths = max(prompts, default=0), [len(ids) - n for ids, n in zip(rows, prompts, strict=True)]
    short = sum(length < low for length in lengths)
    message = f"excerpts of {low} to {high} tokens, context {case.context}; {short} of {len(lengths)} texts are shorter"
    if longest:
        message = f"{message}; prompts of up to {longest} tokens come before them"
    special = sum(map(len, special_around(case.tokenizer)))
    if high > case.context:
        return fail(message, "Lower the second number of excerpt_tokens.")
    if longest + high + special > case.context:
        fix = "Lower the second number of excerpt_tokens, or shorten or drop the longest prompts."
        return fail(f"{message}; {special} special tokens", fix)
    if short > 0.1 * len(lengths):
        return warn(message, "Lower the first number of excerpt_tokens, or give longer texts.")
    return ok(message)


def whole(case: Case, rows: Sequence[Sequence[int]]) -> Result:
    """Check that ranked completions fit into the context behind their prompts, and that few are cut."""
    most, prompts = case.config.preferences.max_tokens, case.notes["prompts"]
    lengths = [len(ids) - prompt for ids, prompt in zip(rows, prompts, strict=True)]
    longest = max((p + min(n, most) for p, n in zip(prompts, lengths, strict=True)), default=0)
    longest += sum(map(len, special_around(case.tokenizer)))
    cut = sum(length > most for length in lengths)
    message = f"up to {longest} tokens, context {case.context}; {cut} of {len(rows)} answers have more than {most}: cut"
    if longest > case.context:
        return fail(message, "Lower preferences.max_tokens, shorten the prompts, or pass --skip_bad_rows.")
    return warn(message, "Raise preferences.max_tokens.") if cut > 0.1 * len(rows) else ok(message)


def memory(case: Case) -> Result:
    """The weights, their gradients and the optimizer state fit into free memory."""
    count = weights_of(case, "policy")
    each = 4 if case.config.lora.rank else 16
    need, free = 0.7 * GB + each * count, free_memory(pick_device(case.config.device))
    message = f"at least {need / GB:.2g} GB of {free / GB:.3g} GB free"
    return grade(need / free, (0.8, 1.2), message, "Train adapters (lora.rank 16), or a smaller model.")
