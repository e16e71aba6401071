"""Checks of how the reward model reads rollouts: by their ids or as text, in which template, up to what length."""

from __future__ import annotations

from pathlib import Path

from apportion.models.loading import with_pad
from apportion.models.policy import banned_ids
from apportion.models.reward import STATISTICS
from apportion.models.text.render import encode, render
from apportion.models.text.token_spans import PolicyText
from apportion.stages.doctor.case import Case
from apportion.stages.doctor.checks.prompts import SOME, rendered
from apportion.stages.doctor.checks.tokens import embedded
from apportion.stages.doctor.findings import FAIL, fail, ok, together, warn

Said = tuple[str, str, str]
ENDLESS = 1 << 30  # tokens, where a model or tokenizer names no limit


def tokenizer(case: Case) -> Said:
    """The reward model reads the policy's rollouts: its ids or its text, and it pads with what is never written."""
    own, config = case.reward_tokenizer, case.config
    pad_token = config.pad_token if config.pad_token in own.get_vocab() else None
    with_pad("reward_model", own, pad_token)
    foreign = own.get_vocab() != case.tokenizer.get_vocab()
    said = as_text(case) if foreign else as_ids(case, pad_token)
    return said if said[0] == FAIL else together(said, template(case, foreign))


def as_ids(case: Case, pad_token: str | None) -> Said:
    """Say how a model with the policy's vocabulary reads its ids."""
    own, text = case.reward_tokenizer, case.reward_settings.get_text_config()
    pad = own.pad_token_id if pad_token is not None or text.pad_token_id is None else text.pad_token_id
    if pad not in banned_ids(case.tokenizer, case.config.sampling.stop):
        said = f"it pads with {own.convert_ids_to_tokens(pad)!r} ({pad}), which the policy can write"
        fix = "Set its pad_token_id to the policy's: a score is read at the last token that is no pad."
        return fail(said, fix)
    written = int(case.policy_settings.get_text_config().vocab_size)  # what has no logit is never sampled
    known = [[i for i in own.get_vocab().values() if i < written]]
    level, said, fix = embedded(own, int(text.vocab_size), [*known, *case.rows], "reward model")
    if level == FAIL:
        return fail(said, fix)
    limit = int(getattr(text, "max_position_embeddings", None) or ENDLESS)
    said = f"the policy's vocabulary ({len(own)} tokens): it reads ids, up to {case.longest} of its {limit}"
    if case.longest > limit:
        return fail(said, "Lower sampling.max_new_tokens or max_prompt_tokens: it has no positions for more.")
    return ok(said)


def as_text(case: Case) -> Said:
    """Say how a model with a tokenizer of its own reads the policy's text: whether its longest prompts have room."""
    own, text = case.reward_tokenizer, case.reward_settings.get_text_config()
    same = len(set(own.get_vocab().items()) & set(case.tokenizer.get_vocab().items()))
    said = f"a tokenizer of its own ({same} of {len(own.get_vocab())} tokens as the policy's): it reads text"
    if not own.is_fast:
        return fail(said, "Save it as a fast one, with a tokenizer.json.")
    count = int(text.vocab_size)
    level, lacking, fix = embedded(own, count, (), "reward model")
    if level == FAIL:
        return fail(lacking, fix)
    policy = PolicyText(case.tokenizer, case.notes.get("conversations", {}))
    answer = case.tokenizer("a", add_special_tokens=False)["input_ids"]
    rows = sorted(case.rows, key=len)[-SOME:]
    longest = max((len(encode(own, render(own, policy, row, answer), count).ids) for row in rows), default=0)
    positions = int(getattr(text, "max_position_embeddings", None) or ENDLESS)
    limit, most = min(positions, own.model_max_length), longest - 1 + case.config.sampling.max_new_tokens
    said = f"{said}, up to about {most} tokens" + (f" of its {limit}" if limit < ENDLESS else "")
    full = "Shorten the prompts, or lower sampling.max_new_tokens: a longer text is not cut, but ends the run."
    if longest > positions:
        return fail(said, full)
    room = warn("", full) if most > limit else ok("")
    return together(ok(said), room, warn(lacking, fix) if fix else ok(""))


def template(case: Case, foreign: bool) -> Said:
    """Say whether a reward model with a chat template is given what it writes."""
    own = case.reward_tokenizer
    if not own.chat_template:
        return ok("")
    if all(isinstance(text, str) for text in case.texts):
        if (Path(case.reward_folder) / STATISTICS).is_file():  # of `apportion reward`, which trains on plain text
            return ok("")
        fix = "Give prompts as conversations (lists of role and content) if it was trained on such."
        return warn("it has a chat template, and prompts are plain text", fix)
    if not foreign and case.conversations and differs(case):
        fix = "It is shown the policy's turns: use the template that it was trained with for both."
        return warn("it reads the policy's chat template, and its own renders otherwise", fix)
    return ok("")


def differs(case: Case) -> bool:
    """Whether the reward model's own template renders conversations otherwise than the policy's, or not at all."""
    from jinja2 import TemplateError

    turns = case.conversations[:SOME]
    try:
        own = rendered(case.reward_tokenizer, turns, True)
    except (ValueError, TypeError, TemplateError):
        return True
    return own != rendered(case.tokenizer, turns, True)
