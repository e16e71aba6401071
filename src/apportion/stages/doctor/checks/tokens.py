"""Checks of special tokens (padding, EOS, BOS), and of embeddings for every id."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from apportion.models.loading import embeddings_of
from apportion.models.text.chat import TemplateError, apply_template, with_response
from apportion.models.text.render import beyond
from apportion.models.tokenizers import check_ends, end_ids, needed_rows, pad_id, unnamed_ids, with_pad
from apportion.stages.doctor.case import Case
from apportion.stages.doctor.findings import OK, Result, combine, fail, ok, warn

RESERVED = "Pass --pad_token with a reserved token of the vocabulary that never occurs in text."


def pad_token(case: Case) -> Result:
    """Padding has an id that is no ordinary token: the pad token's, or EOS where there is none."""
    given = case.config.pad_token
    stored, known = case.tokenizer.pad_token_id, given is None or given in case.tokenizer.get_vocab()
    special = special_ids(case.tokenizer)
    # a policy gets the token and an embedding for it; a reward model is trained with tokens of its vocabulary
    tokenizer = with_pad("policy", case.tokenizer, given, add=hasattr(case.config, "policy"))
    eos = f"EOS {tokenizer.eos_token!r}"
    if tokenizer.pad_token_id is None:
        return ok(f"no pad token, no EOS: id {pad_id(tokenizer)} fills masked places")
    message = f"pad {tokenizer.pad_token!r} ({tokenizer.pad_token_id}), {eos}"
    if not known:
        return ok(f"{message}; the pad token is added to the vocabulary")
    if stored is None and given is None:
        return ok(f"{message}: EOS fills masked places, as there is no pad token")
    if tokenizer.pad_token_id in end_ids(tokenizer, case.stops):
        return ok(f"{message}: the pad token also ends texts, and masks tell the two apart")
    if given is not None and tokenizer.pad_token_id not in special:
        return warn(f"{message}: the pad token is an ordinary token, which is then never generated", RESERVED)
    return ok(message)


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of the tokens that are marked as special."""
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)


def stop_tokens(case: Case) -> Result:
    """Responses end with the tokens that end the policy's texts."""
    tokenizer, stop = case.tokenizer, case.config.sampling.stop
    ends = end_ids(tokenizer, case.stops)
    check_ends(ends, stop)
    names = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in ends)
    message = f"texts end at {names or 'no token'}"
    fix = "Set eos_token in the policy's tokenizer_config.json to the token that ends its texts."
    beyond_tokens = sorted(case.stops - set(ends))
    if beyond_tokens:
        message = f"{message}; its generation settings also name {beyond_tokens}, which are no tokens and are ignored"
    end = turn_end(case)
    if end is not None and end not in ends:
        message = f"{message}; the chat template ends a turn with {tokenizer.convert_ids_to_tokens(end)!r} ({end})"
        return warn(message, fix)
    if beyond_tokens:
        return warn(message, "Use the tokenizer that belongs to these settings.")
    return ok(message)


def turn_end(case: Case) -> int | None:
    """Return the special token that the chat template adds after a response, or None."""
    if not case.conversations or not case.tokenizer.chat_template:
        return None
    answer = "RESPONSE"
    try:
        text = apply_template(case.tokenizer, with_response(case.conversations[0], answer), generation=False)
    except TemplateError:  # it renders no answers
        return None
    if answer not in text:
        return None
    after = case.tokenizer(text[text.rindex(answer) + len(answer) :], add_special_tokens=False)["input_ids"]
    special = special_ids(case.tokenizer)
    return next((i for i in after if i in special), None)


def beginning(case: Case) -> Result:
    """Prompts begin with one BOS token, where the tokenizer adds it."""
    tokenizer, rows = case.tokenizer, case.rows
    bos = tokenizer.bos_token_id
    if bos is None:
        return ok("the tokenizer has no BOS token")
    doubled = sum(list(row[:2]) == [bos, bos] for row in rows)
    with_bos = sum(list(row[:1]) == [bos] for row in rows)
    adds = tokenizer("a")["input_ids"][:1] == [bos]
    message = f"BOS {tokenizer.bos_token!r} ({bos}) begins {with_bos} of {len(rows)} prompts, twice in {doubled}"
    if doubled:
        return fail(message, "Remove it from the texts or from the chat template: the tokenizer adds one already.")
    if adds and with_bos < len(rows):
        fix = "Let the chat template begin with {{ bos_token }}, as the tokenizer does for plain text."
        return warn(message, fix)
    if with_bos not in (0, len(rows)):
        return warn(message, "Begin every prompt with BOS, or none.")
    requested = tokenizer.init_kwargs.get("add_bos_token")
    if requested and not adds and not with_bos:
        fix = "Its tokenizer_config.json has add_bos_token, but its tokenizer.json adds none: save it again."
        return fail(message, fix)
    return ok(message)


def prompt_ids(case: Case) -> Result:
    """Prompts hold no pad token, hardly any unknown token, and no EOS at their end."""
    counted = Counter(i for row in case.rows for i in row)
    total = max(1, sum(counted.values()))
    pad, ends = case.tokenizer.pad_token_id, end_ids(case.tokenizer, case.stops)
    pads = counted[pad] if pad not in (*ends, case.tokenizer.bos_token_id) else 0  # those belong into texts
    unknown = counted[case.tokenizer.unk_token_id] if case.tokenizer.unk_token_id is not None else 0
    message = f"{pads} pad and {unknown} unknown of {total} prompt tokens"
    result = ending(case)
    if result.level != OK:
        return combine(ok(message), result)
    if pads:
        return warn(message, f"The pad token occurs in the texts. {RESERVED}")
    if unknown > 0.01 * total:
        return warn(message, "The policy's tokenizer does not know this script: use other prompts, or another policy.")
    return ok(message)


def ending(case: Case) -> Result:
    """Check that plain-text prompts do not end with EOS: the policy would generate after the end of a text."""
    tokenizer, eos = case.tokenizer, case.tokenizer.eos_token_id
    plain = [row for text, row in zip(case.texts, case.rows, strict=True) if isinstance(text, str)]
    count = sum(list(row[-1:]) == [eos] and len(row) > 1 for row in plain) if eos is not None else 0
    if not count:
        return ok("")
    message = f"{count} of {len(plain)} end with EOS {tokenizer.eos_token!r}"
    if tokenizer("a")["input_ids"][-1:] == [eos]:
        return fail(f"{message}, which the tokenizer adds", "Set add_eos_token to false, and save the tokenizer again.")
    return warn(message, "Remove it from those texts: for the policy the text ends there.")


def vocabulary(case: Case) -> Result:
    """Every id of the prompts and every special token has an embedding."""
    rows = embeddings_of(case.policy_folder, case.policy_settings)
    rows = max(rows, needed_rows(case.tokenizer, case.config.pad_token))  # an added pad token gets an embedding
    result = embedded(case.tokenizer, rows, case.rows, "policy")
    unnamed = len(unnamed_ids(case.tokenizer, rows))
    if not unnamed:
        return result
    return result._replace(message=f"{result.message}; {unnamed} ids without a token are never sampled")


def embedded(tokenizer: Any, count: int, rows: Iterable[Sequence[int]], named: str) -> Result:
    """Check that ids are below `count`: those in `rows`, special tokens, and tokens that are not used."""
    vocabulary = tokenizer.get_vocab()
    message = f"{len(vocabulary)} tokens with ids up to {max(vocabulary.values())}, {count} embeddings"
    fix = f"Use the tokenizer that the {named} was trained with, or `model.resize_token_embeddings` and train it."
    used = beyond(tokenizer, count, rows)
    if used:
        return fail(f"{message}; {len(used)} ids in use have none: {', '.join(map(str, used[:3]))}", fix)
    spare = [i for i in vocabulary.values() if i >= count]
    if not spare:
        return ok(message)
    message = f"{message}; {len(spare)} tokens have none, and none of them is used"
    # an added token may be reserved, or stand for an image; the model should know ordinary tokens
    return ok(message) if set(spare) <= set(tokenizer.added_tokens_decoder) else warn(message, fix)
