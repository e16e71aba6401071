"""Checks of how the reward model encodes rollouts: as ids or as text, in which template, up to what length."""

from __future__ import annotations

from pathlib import Path

from apportion.models.reward import STATISTICS
from apportion.models.text.render import encode, render
from apportion.models.text.token_spans import PolicyText
from apportion.models.tokenizers import banned_ids, with_pad
from apportion.stages.doctor.case import Case
from apportion.stages.doctor.checks.prompts import SAMPLE, rendered
from apportion.stages.doctor.checks.tokens import embedded
from apportion.stages.doctor.findings import FAIL, Result, combine, fail, ok, warn

UNLIMITED = 1 << 30  # tokens, where a model or tokenizer has no limit


def tokenizer(case: Case) -> Result:
    """The reward model can encode the policy's rollouts, and its pad token is never generated."""
    own, config = case.reward_tokenizer, case.config
    pad_token = config.pad_token if config.pad_token in own.get_vocab() else None
    with_pad("reward_model", own, pad_token)
    foreign = own.get_vocab() != case.tokenizer.get_vocab()
    result = as_text(case) if foreign else as_ids(case, pad_token)
    return result if result.level == FAIL else combine(result, template(case, foreign))


def as_ids(case: Case, pad_token: str | None) -> Result:
    """Check a reward model with the policy's vocabulary, which scores ids."""
    own, text = case.reward_tokenizer, case.reward_settings.get_text_config()
    pad = own.pad_token_id if pad_token is not None or text.pad_token_id is None else text.pad_token_id
    if pad not in banned_ids(case.tokenizer, case.config.sampling.stop):
        message = f"it pads with {own.convert_ids_to_tokens(pad)!r} ({pad}), which the policy can generate"
        fix = "Set its pad_token_id to the policy's: the score is taken at the last token that is not padding."
        return fail(message, fix)
    sampled = int(case.policy_settings.get_text_config().vocab_size)  # ids without a logit are never sampled
    known = [[i for i in own.get_vocab().values() if i < sampled]]
    embeddings = embedded(own, int(text.vocab_size), [*known, *case.rows], "reward model")
    if embeddings.level == FAIL:
        return embeddings
    limit = int(getattr(text, "max_position_embeddings", None) or UNLIMITED)
    message = f"the policy's vocabulary ({len(own)} tokens): it scores ids, up to {case.longest} of its {limit}"
    if case.longest > limit:
        return fail(message, "Lower sampling.max_new_tokens or max_prompt_tokens: its positions end there.")
    return ok(message)


def as_text(case: Case) -> Result:
    """Check a reward model with its own tokenizer, which scores text: whether the longest prompts fit."""
    own, text = case.reward_tokenizer, case.reward_settings.get_text_config()
    same = len(set(own.get_vocab().items()) & set(case.tokenizer.get_vocab().items()))
    message = f"its own tokenizer ({same} of {len(own.get_vocab())} tokens shared with the policy): it scores text"
    if not own.is_fast:
        return fail(message, "Save it as a fast tokenizer, with a tokenizer.json.")
    count = int(text.vocab_size)
    embeddings = embedded(own, count, (), "reward model")
    if embeddings.level == FAIL:
        return embeddings
    policy = PolicyText(case.tokenizer, case.notes.get("conversations", {}))
    answer = case.tokenizer("a", add_special_tokens=False)["input_ids"]
    rows = sorted(case.rows, key=len)[-SAMPLE:]
    longest = max((len(encode(own, render(own, policy, row, answer), count).ids) for row in rows), default=0)
    positions = int(getattr(text, "max_position_embeddings", None) or UNLIMITED)
    limit, most = min(positions, own.model_max_length), longest - 1 + case.config.sampling.max_new_tokens
    message = f"{message}, up to about {most} tokens" + (f" of its {limit}" if limit < UNLIMITED else "")
    full = "Shorten the prompts, or lower sampling.max_new_tokens: a longer text is not truncated, but stops the run."
    if longest > positions:
        return fail(message, full)
    room = warn("", full) if most > limit else ok("")
    return combine(ok(message), room, embeddings if embeddings.fix else ok(""))


def template(case: Case, foreign: bool) -> Result:
    """Check that a reward model with a chat template gets text in that template."""
    own = case.reward_tokenizer
    if not own.chat_template:
        return ok("")
    if all(isinstance(text, str) for text in case.texts):
        if (
            Path(case.reward_folder) / STATISTICS
        ).is_file():  # written by `apportion reward`, which trains on plain text
            return ok("")
        fix = "Give prompts as conversations (lists of role and content) if it was trained on them."
        return warn("it has a chat template, and prompts are plain text", fix)
    if not foreign and case.conversations and differs(case):
        fix = "It gets the policy's rendering: use the template that it was trained with for both."
        return warn("it gets the policy's chat template, and its own renders differently", fix)
    return ok("")


def differs(case: Case) -> bool:
    """Whether the reward model's template renders conversations differently from the policy's, or not at all."""
    from jinja2 import TemplateError

    turns = case.conversations[:SAMPLE]
    try:
        own = rendered(case.reward_tokenizer, turns, True)
    except (ValueError, TypeError, TemplateError):
        return True
    return own != rendered(case.tokenizer, turns, True)
