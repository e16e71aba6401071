"""Checks of texts: lengths, duplicates, overlap of training and test data, and the chat template."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from apportion.models.text.chat import TemplateError, apply_template, as_text, with_response
from apportion.stages.doctor.case import Case
from apportion.stages.doctor.findings import Result, combine, fail, ok, skip, warn

SAMPLE = 16  # conversations that are rendered
SAME_START = 0.2  # share of cut prompts that may start like another one
ANSWER = "RESPONSE"
MARKER = re.compile(r"<\|[^|<>\s]+\|>|<(?:start|end)_of_turn>")  # markers that templates add


def lengths(case: Case) -> Result:
    """Every prompt has a token, and its response fits into the policy's context."""
    sampling = case.config.sampling
    limit = min(sampling.max_prompt_tokens, case.context - sampling.max_new_tokens)
    counts = [len(row) for row in case.rows]
    empty, long = counts.count(0), sum(count > limit for count in counts)
    message = f"{len(counts)} prompts of {min(counts)} to {max(counts)} tokens (median {statistics.median(counts):g})"
    message = f"{message}, at most {limit}: {empty} empty, {long} too long"
    if limit < 1:
        return fail(message, f"Lower sampling.max_new_tokens: the context is {case.context} tokens.")
    if empty or long:
        first = next(i for i, count in enumerate(counts) if not 0 < count <= limit) + 1
        fix = f"Row {first} is the first: shorten or drop such rows, or set sampling.prompt_tokens to cut them."
        return fail(message, fix)
    return ok(message)


def duplicates(case: Case) -> Result:
    """Prompts are distinct, as texts and as token ids."""
    cut = case.config.sampling.prompt_tokens
    repeated = len(case.texts) - len(set(keys(case.texts)))
    alike = len(case.rows) - len(set(map(tuple, case.rows)))
    per_step = case.config.sampling.batch_size // (case.config.sampling.samples_per_prompt or 1)
    passes = case.config.steps * per_step / max(1, len(case.texts))
    message = f"{max(repeated, alike)} of {len(case.texts)} prompts repeat another"
    message = f"{message}; the run goes through them {passes:.2g} times"
    if alike > (SAME_START if cut else 0.01) * len(case.rows) and alike > repeated:
        what = f"{alike} of {len(case.rows)} have the same "
        if cut is None:
            return warn(f"{message}; {what}tokens", "Drop those rows: the policy cannot distinguish them.")
        fix = "They start alike: set sampling.prompt_tokens to null, or to larger numbers."
        return warn(f"{message}; {what}first {cut[0]} to {cut[1]} tokens, which are the prompt", fix)
    if repeated > 0.01 * len(case.texts):
        return warn(message, "Drop the repeated rows: they have more weight, and may be on both sides of a split.")
    return ok(message)


def evaluation(case: Case) -> Result:
    """Training prompts and evaluation prompts are disjoint."""
    if case.evaluation is None:
        return skip("no evaluation prompts given; --eval_prompts FILE compares them")
    training, evaluation = set(keys(case.texts)), list(keys(case.evaluation))
    both = sum(key in training for key in evaluation)
    message = f"{both} of {len(evaluation)} evaluation prompts are also training prompts"
    return fail(message, "Remove them from one of the two files.") if both else ok(message)


def reward_data(case: Case) -> Result:
    """The reward model's held-out texts and the prompts are not among its training texts."""
    if "reward_data" in case.notes:
        return warn(f"it cannot be read: {case.notes['reward_data']}", "Move it back to compare.")
    if case.training is None or case.held_out is None:
        return skip("the reward model's folder does not name its training data")
    training = set(keys(row.text for row in case.training))
    both = sum(key in training for key in keys(row.text for row in case.held_out))
    prompts = sum(key in training for key in keys(case.texts))
    message = f"{both} of {len(case.held_out)} held-out texts"
    message = f"{message} and {prompts} of {len(case.texts)} prompts" if case.texts else message
    message = f"{message} are among the {len(case.training)} training texts of the reward model"
    if both:
        fix = "Its held-out accuracy means nothing: give `apportion reward` a --test_data without them."
        return fail(message, fix)
    if prompts:
        return warn(message, "It is most confident on its training texts: use prompts that it has not seen.")
    return ok(message)


def keys(texts: Iterable[Any]) -> Iterable[str]:
    """Yield each text or conversation in lower case and with single spaces."""
    for text in texts:
        full = text if isinstance(text, str) else json.dumps(text, sort_keys=True, ensure_ascii=False)
        yield " ".join(full.lower().split())


def chat_template(case: Case) -> Result:
    """Conversations survive encoding and decoding, each marker is one token, and a generation prompt is added."""
    turns, tokenizer, cut = case.conversations[:SAMPLE], case.tokenizer, case.config.sampling.prompt_tokens
    if cut is not None and (count := sum(not isinstance(text, str) for text in case.texts)):
        message = f"{count} conversations are cut to their first {cut[0]} to {cut[1]} tokens"
        message = f"{message}, {len(set(map(tuple, case.rows)))} of {len(case.rows)} of which differ"
        return fail(message, "Set sampling.prompt_tokens to null, or give prompts as text.")
    if not turns:
        return skip("prompts are plain text")
    if not tokenizer.chat_template:
        fix = "Use a policy with a chat template, or give prompts as text."
        return fail(f"{len(case.conversations)} conversations and no chat template", fix)
    texts = rendered(tokenizer, turns, True)
    return combine(
        generation_prompt(tokenizer, turns, texts),
        markers(tokenizer, turns),
        arguments(case.notes.get("hidden", ())),
        round_trip(tokenizer, turns, texts),
    )


def arguments(hidden: Sequence[str]) -> Result:
    """Check that tools and arguments of their calls are rendered; `hidden` are those that are not, in words."""
    if not hidden:
        return ok("")
    message = f"{len(hidden)} tools or texts in arguments of tool calls are not rendered, the first {hidden[0]}"
    return warn(message, "The policy does not see them: use a chat template that shows them, if they matter.")


def generation_prompt(tokenizer: Any, turns: Sequence[Any], texts: Sequence[str]) -> Result:
    """Check that the rendered `texts` end with a generation prompt, or directly before the answer.

    Some templates end a user turn with the text that the answer follows ([/INST]) and have no generation prompt; others
    render an empty thinking block before an answer, and have one.
    """
    plain = rendered(tokenizer, turns, False)
    without = [one for one, a, p in zip(turns, texts, plain, strict=True) if a == p or not a.startswith(p)]
    if all(answer_follows(tokenizer, one) for one in without if one[-1].get("role") != "assistant"):
        return ok("")
    fix = "Let it add the header of the assistant turn where add_generation_prompt is true."
    return warn("the chat template writes no generation prompt", fix)


def answer_follows(tokenizer: Any, turns: Sequence[Any]) -> bool:
    """Whether the template puts an answer directly after the rendered `turns`, except for white space."""
    answered = with_response(turns, ANSWER)
    try:
        full, text = rendered(tokenizer, [answered], False)[0], rendered(tokenizer, [turns], True)[0]
    except TemplateError:  # it renders no answers
        return False
    return full.startswith(text) and full[len(text) :].lstrip().startswith(ANSWER)


def markers(tokenizer: Any, turns: Sequence[Any]) -> Result:
    """Check that each marker of the template is one token."""
    # only the template's own markers
    blank = [as_text(one).with_turns({**turn, "content": "x"} for turn in one) for one in turns]
    marks = {mark for text in rendered(tokenizer, blank, True) for mark in MARKER.findall(text)}
    split = sorted(mark for mark in marks if not is_token(tokenizer, mark))
    if split:
        fix = "Add them to the tokenizer as special tokens, or use the template that the policy was trained with."
        return warn(f"markers of the chat template that are not single tokens: {', '.join(split)}", fix)
    return ok("")


def round_trip(tokenizer: Any, turns: Sequence[Any], texts: Sequence[str]) -> Result:
    """Check that the ids of conversations decode to their rendered text, and that messages hold no special token."""
    every = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    back = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in every]
    changed = [i for i, (a, b) in enumerate(zip(texts, back, strict=True)) if a != b]
    message = f"{len(turns)} conversations of {min(map(len, every))} to {max(map(len, every))} tokens"
    if changed:
        at = next((i for i, (a, b) in enumerate(zip(texts[changed[0]], back[changed[0]], strict=False)) if a != b), 0)
        got = f"{texts[changed[0]][at : at + 20]!r} becomes {back[changed[0]][at : at + 20]!r}"
        fix = "The tokenizer changes the template's text: check its normaliser and its special tokens."
        return warn(f"{message}; {len(changed)} change when decoded: {got}", fix)
    special = [token for token in tokenizer.all_special_tokens if token.strip()]
    inside = sum(any(s in str(turn.get("content")) for s in special for turn in one) for one in turns)
    if inside:
        fix = "Remove special tokens from the messages: the policy would see them as turns."
        return warn(f"{message}; {inside} have special tokens inside a message", fix)
    last = sum(one[-1].get("role") == "assistant" for one in turns)
    if last:
        fix = "Remove that turn, unless it is the beginning of the response."
        return warn(f"{message}; {last} end with an assistant turn, which the response continues", fix)
    return ok(f"{message}, unchanged when decoded; they end with {texts[0][-24:]!r}")


def rendered(tokenizer: Any, turns: Sequence[Any], prompt: bool) -> list[str]:
    """Return the conversations as text, with the generation prompt where `prompt`."""
    return [apply_template(tokenizer, one, generation=prompt) for one in turns]


def is_token(tokenizer: Any, mark: str) -> bool:
    """Whether `mark` is one token."""
    return len(tokenizer(mark, add_special_tokens=False)["input_ids"]) == 1
