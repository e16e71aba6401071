"""Checks of texts: lengths, duplicates, rows that are in training and in test data, and the chat template."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from apportion.stages.doctor.case import Case
from apportion.stages.doctor.findings import fail, ok, skip, together, warn

Said = tuple[str, str, str]
SOME = 16  # conversations that are rendered
OPENINGS = 0.2  # share of prompts cut to their first tokens that may begin as another does
ANSWER = "RESPONSE"
MARKER = re.compile(r"<\|[^|<>\s]+\|>|<(?:start|end)_of_turn>")  # what templates write for the model alone


def lengths(case: Case) -> Said:
    """Every prompt has a token, and room for its response in the policy's context."""
    sampling = case.config.sampling
    limit = min(sampling.max_prompt_tokens, case.context - sampling.max_new_tokens)
    counts = [len(row) for row in case.rows]
    empty, long = counts.count(0), sum(count > limit for count in counts)
    said = f"{len(counts)} prompts of {min(counts)} to {max(counts)} tokens (median {statistics.median(counts):g})"
    said = f"{said}, at most {limit}: {empty} empty, {long} too long"
    if limit < 1:
        return fail(said, f"Lower sampling.max_new_tokens: the context is {case.context} tokens.")
    if empty or long:
        first = next(i for i, count in enumerate(counts) if not 0 < count <= limit) + 1
        fix = f"Row {first} is the first: shorten or drop such rows, or set sampling.prompt_tokens to cut them."
        return fail(said, fix)
    return ok(said)


def duplicates(case: Case) -> Said:
    """Prompts are distinct, as texts and as what of them is sampled on."""
    cut = case.config.sampling.prompt_tokens
    repeated = len(case.texts) - len(set(keys(case.texts)))
    alike = len(case.rows) - len(set(map(tuple, case.rows)))
    per_step = case.config.sampling.batch_size // (case.config.sampling.samples_per_prompt or 1)
    passes = case.config.steps * per_step / max(1, len(case.texts))
    said = f"{max(repeated, alike)} of {len(case.texts)} prompts repeat another"
    said = f"{said}; the run goes through them {passes:.2g} times"
    if alike > (OPENINGS if cut else 0.01) * len(case.rows) and alike > repeated:
        what = f"{alike} of {len(case.rows)} are alike in "
        if cut is None:
            return warn(f"{said}; {what}their tokens", "Drop those rows: the policy cannot tell them from one another.")
        fix = "They have a common beginning: set sampling.prompt_tokens to null, or to longer openings."
        return warn(f"{said}; {what}the {cut[0]} to {cut[1]} tokens that are sampled on", fix)
    if repeated > 0.01 * len(case.texts):
        return warn(said, "Drop the repeated rows: they weigh more, and fall on both sides of a split.")
    return ok(said)


def evaluation(case: Case) -> Said:
    """No prompt that the policy learns from is one that it will be evaluated on."""
    if case.evaluation is None:
        return skip("no evaluation prompts given; --eval_prompts FILE compares them")
    learned, asked = set(keys(case.texts)), list(keys(case.evaluation))
    both = sum(key in learned for key in asked)
    said = f"{both} of {len(asked)} evaluation prompts are trained on"
    return fail(said, "Take them out of one of the two files.") if both else ok(said)


def reward_data(case: Case) -> Said:
    """The reward model was judged on texts that it had not learned from, and does not score those either."""
    if "reward_data" in case.notes:
        return warn(f"it cannot be read: {case.notes['reward_data']}", "Put it back where it was, to compare.")
    if case.training is None or case.held_out is None:
        return skip("the reward model's folder does not say what it learned from")
    learned = set(keys(row.text for row in case.training))
    both = sum(key in learned for key in keys(row.text for row in case.held_out))
    again = sum(key in learned for key in keys(case.texts))
    said = f"{both} of {len(case.held_out)} held-out texts"
    said = f"{said} and {again} of {len(case.texts)} prompts" if case.texts else said
    said = f"{said} are among the {len(case.training)} that the reward model learned from"
    if both:
        fix = "Its held-out accuracy says nothing: give `apportion reward` a --test_data without them."
        return fail(said, fix)
    if again:
        return warn(said, "It is surest where it learned: take prompts that it has not seen.")
    return ok(said)


def keys(texts: Iterable[Any]) -> Iterable[str]:
    """Give each text or conversation without its differences of white space and case."""
    for text in texts:
        whole = text if isinstance(text, str) else json.dumps(text, sort_keys=True, ensure_ascii=False)
        yield " ".join(whole.lower().split())


def chat_template(case: Case) -> Said:
    """Conversations become tokens and back, each marker is one token, and the answer is asked for."""
    turns, tokenizer, cut = case.conversations[:SOME], case.tokenizer, case.config.sampling.prompt_tokens
    if cut is not None and (count := sum(not isinstance(text, str) for text in case.texts)):
        said = f"{count} conversations are cut to their first {cut[0]} to {cut[1]} tokens"
        said = f"{said}, {len(set(map(tuple, case.rows)))} of {len(case.rows)} of which differ"
        return fail(said, "Set sampling.prompt_tokens to null, or give prompts as text.")
    if not turns:
        return skip("prompts are plain text")
    if not tokenizer.chat_template:
        fix = "Use a policy with a chat template, or give prompts as text."
        return fail(f"{len(case.conversations)} conversations and no chat template", fix)
    asking = rendered(tokenizer, turns, True)
    return together(asked(tokenizer, turns, asking), markers(tokenizer, turns), round_trip(tokenizer, turns, asking))


def asked(tokenizer: Any, turns: Sequence[Any], asking: Sequence[str]) -> Said:
    """Say whether the answer is asked for: what is rendered is followed by the answer, or by a generation prompt.

    Some templates end a user's turn with what the answer follows ([/INST]) and have no generation prompt; others write
    empty thoughts before an answer that they show, and have one.
    """
    plain = rendered(tokenizer, turns, False)
    silent = [one for one, a, p in zip(turns, asking, plain, strict=True) if a == p or not a.startswith(p)]
    if all(followed(tokenizer, one) for one in silent if one[-1].get("role") != "assistant"):
        return ok("")
    fix = "Let it write the head of the assistant's turn where add_generation_prompt is true."
    return warn("the chat template writes no generation prompt", fix)


def followed(tokenizer: Any, turns: Sequence[Any]) -> bool:
    """Whether the template puts an answer right after what it renders of `turns`, but for white space."""
    from jinja2 import TemplateError

    answered = [*turns, {"role": "assistant", "content": ANSWER}]
    try:
        whole, asking = rendered(tokenizer, [answered], False)[0], rendered(tokenizer, [turns], True)[0]
    except (ValueError, TypeError, TemplateError):  # it shows no answer
        return False
    return whole.startswith(asking) and whole[len(asking) :].lstrip().startswith(ANSWER)


def markers(tokenizer: Any, turns: Sequence[Any]) -> Said:
    """Say whether each marker that the template writes is one token."""
    blank = [[{**turn, "content": "x"} for turn in one] for one in turns]  # markers of the template alone
    marks = {mark for text in rendered(tokenizer, blank, True) for mark in MARKER.findall(text)}
    torn = sorted(mark for mark in marks if not is_token(tokenizer, mark))
    if torn:
        fix = "Add them to the tokenizer as special tokens, or use the template that the policy was trained with."
        return warn(f"markers of the chat template that are no tokens: {', '.join(torn)}", fix)
    return ok("")


def round_trip(tokenizer: Any, turns: Sequence[Any], asking: Sequence[str]) -> Said:
    """Say whether the ids of conversations decode to what was rendered, with no marker from within a message."""
    every = [tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=False) for t in turns]
    back = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in every]
    changed = [i for i, (a, b) in enumerate(zip(asking, back, strict=True)) if a != b]
    said = f"{len(turns)} conversations of {min(map(len, every))} to {max(map(len, every))} tokens"
    if changed:
        at = next((i for i, (a, b) in enumerate(zip(asking[changed[0]], back[changed[0]], strict=False)) if a != b), 0)
        got = f"{asking[changed[0]][at : at + 20]!r} comes back as {back[changed[0]][at : at + 20]!r}"
        fix = "The tokenizer does not keep the template's text: check its normaliser and its special tokens."
        return warn(f"{said}; {len(changed)} change when decoded: {got}", fix)
    special = [token for token in tokenizer.all_special_tokens if token.strip()]
    inside = sum(any(s in str(turn.get("content")) for s in special for turn in one) for one in turns)
    if inside:
        fix = "Take special tokens out of the messages: the policy takes them for turns of their own."
        return warn(f"{said}; {inside} have special tokens inside a message", fix)
    last = sum(one[-1].get("role") == "assistant" for one in turns)
    if last:
        fix = "End each with a user's turn: the answer would follow an answer."
        return warn(f"{said}; {last} end with an assistant's turn", fix)
    return ok(f"{said}, unchanged when decoded; they end with {asking[0][-24:]!r}")


def rendered(tokenizer: Any, turns: Sequence[Any], ask: bool) -> list[str]:
    """Return the conversations as text."""
    return [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=ask) for one in turns]


def is_token(tokenizer: Any, mark: str) -> bool:
    """Whether `mark` is one token."""
    return len(tokenizer(mark, add_special_tokens=False)["input_ids"]) == 1
