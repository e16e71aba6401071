"""Checks of special tokens: padding, end and beginning of text, and whether every id has an embedding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from apportion.models.loading import with_pad
from apportion.models.policy import banned_ids
from apportion.models.text.render import beyond
from apportion.stages.doctor.case import Case
from apportion.stages.doctor.findings import OK, fail, ok, together, warn

Said = tuple[str, str, str]
RESERVED = "Pass --pad_token with a reserved token of the vocabulary that never stands in text."


def pad_token(case: Case) -> Said:
    """Padding has an id of its own, which ends no text."""
    tokenizer = with_pad("policy", case.tokenizer, case.config.pad_token)
    said = f"pad {tokenizer.pad_token!r} ({tokenizer.pad_token_id}), EOS {tokenizer.eos_token!r}"
    if tokenizer.pad_token_id in case.stops:
        return warn(f"{said}: the policy's generation settings also stop at the pad token", RESERVED)
    return ok(said)


def stop_tokens(case: Case) -> Said:
    """Responses end where the policy ends its texts."""
    tokenizer, stop = case.tokenizer, case.config.sampling.stop
    banned_ids(tokenizer, stop)
    eos = tokenizer.eos_token_id
    ends = turn_end(case)
    said = f"EOS {tokenizer.eos_token!r} ({eos}), generation stops at {sorted(case.stops)}"
    fix = "Set eos_token in the policy's tokenizer_config.json to the token that ends its texts."
    if ends is not None and ends != eos:
        said = f"{said}; the chat template ends a turn with {tokenizer.convert_ids_to_tokens(ends)!r} ({ends})"
    if case.stops and eos not in case.stops:
        return (fail if stop == "eos" else warn)(said, fix)
    # a base model may well end with its EOS what the template would end otherwise
    if ends in (None, eos):
        return ok(said)
    # where the model itself stops at the turn's end, it writes that, and not the tokenizer's EOS
    return (fail if stop == "eos" and ends in case.stops else warn)(said, fix)


def turn_end(case: Case) -> int | None:
    """Return the special token that the chat template writes after a response, or None where it writes none."""
    from jinja2 import TemplateError

    if not case.conversations or not case.tokenizer.chat_template:
        return None
    said = "RESPONSE"
    turns = [*case.conversations[0], {"role": "assistant", "content": said}]
    try:
        text = case.tokenizer.apply_chat_template(turns, tokenize=False)
    except (ValueError, TemplateError):  # a template without answers says nothing of how they end
        return None
    after = case.tokenizer(text[text.rindex(said) + len(said) :], add_special_tokens=False)["input_ids"]
    special = {i for i, token in case.tokenizer.added_tokens_decoder.items() if token.special}
    return next((i for i in after if i in special | set(case.tokenizer.all_special_ids)), None)


def beginning(case: Case) -> Said:
    """Prompts begin with the beginning-of-text token once, where the tokenizer writes one."""
    tokenizer, rows = case.tokenizer, case.rows
    bos = tokenizer.bos_token_id
    if bos is None:
        return ok("the tokenizer has no BOS token")
    doubled = sum(list(row[:2]) == [bos, bos] for row in rows)
    begun = sum(list(row[:1]) == [bos] for row in rows)
    writes = tokenizer("a")["input_ids"][:1] == [bos]
    said = f"BOS {tokenizer.bos_token!r} ({bos}) begins {begun} of {len(rows)} prompts, twice in {doubled}"
    if doubled:
        return fail(said, "Take it out of the texts, or out of the chat template: the tokenizer writes one already.")
    if writes and begun < len(rows):
        fix = "Let the chat template begin with {{ bos_token }}: the tokenizer begins every plain text with it."
        return warn(said, fix)
    if begun not in (0, len(rows)):
        return warn(said, "Begin every prompt with it, or none.")
    asked = tokenizer.init_kwargs.get("add_bos_token")
    if asked and not writes and not begun:
        fix = "Its tokenizer_config.json says add_bos_token, but its tokenizer.json writes none: save it again."
        return fail(said, fix)
    return ok(said)


def prompt_ids(case: Case) -> Said:
    """Prompts hold no padding and hardly any unknown token, and end with no EOS."""
    counted = Counter(i for row in case.rows for i in row)
    total = max(1, sum(counted.values()))
    pads = counted[case.tokenizer.pad_token_id]
    unknown = counted[case.tokenizer.unk_token_id] if case.tokenizer.unk_token_id is not None else 0
    said = f"{pads} pad and {unknown} unknown of {total} prompt tokens"
    ended = ending(case)
    if ended[0] != OK:
        return together(ok(said), ended)
    if pads:
        return warn(said, f"The pad token stands in the texts. {RESERVED}")
    if unknown > 0.01 * total:
        return warn(said, "The policy cannot read these texts: use prompts in its script, or another policy.")
    return ok(said)


def ending(case: Case) -> Said:
    """Say how many prompts that are text end with EOS: the policy would write after the end of a text."""
    tokenizer, eos = case.tokenizer, case.tokenizer.eos_token_id
    plain = [row for text, row in zip(case.texts, case.rows, strict=True) if isinstance(text, str)]
    count = sum(list(row[-1:]) == [eos] and len(row) > 1 for row in plain) if eos is not None else 0
    if not count:
        return ok("")
    said = f"{count} of {len(plain)} end with EOS {tokenizer.eos_token!r}"
    if tokenizer("a")["input_ids"][-1:] == [eos]:
        return fail(f"{said}, which the tokenizer writes", "Set add_eos_token false, and save the tokenizer again.")
    return warn(said, "Take it out of those texts: the policy has learned that a text ends there.")


def vocabulary(case: Case) -> Said:
    """Every id of the prompts, and of padding, end and beginning of text, has an embedding."""
    rows = int(case.policy_settings.get_text_config().vocab_size)
    return embedded(case.tokenizer, rows, case.rows, "policy")


def embedded(tokenizer: Any, count: int, rows: Iterable[Sequence[int]], named: str) -> Said:
    """Say which ids lie beyond `count` embeddings: in `rows` or special ones, or tokens that nothing uses."""
    words = tokenizer.get_vocab()
    said = f"{len(words)} tokens with ids up to {max(words.values())}, {count} embeddings"
    fix = f"Use the tokenizer that the {named} was trained with, or `model.resize_token_embeddings` and train it."
    used = beyond(tokenizer, count, rows)
    if used:
        return fail(f"{said}; {len(used)} ids in use have none: {', '.join(map(str, used[:3]))}", fix)
    spare = [i for i in words.values() if i >= count]
    if not spare:
        return ok(said)
    said = f"{said}; {len(spare)} tokens have none, and none of them is used"
    # an added token may stand for an image or be reserved; words of its own the model should know
    return ok(said) if set(spare) <= set(tokenizer.added_tokens_decoder) else warn(said, fix)
