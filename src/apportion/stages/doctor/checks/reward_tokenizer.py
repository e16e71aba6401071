"""Checks of how the reward model encodes rollouts: as ids or as text, in which template, up to what length."""

from __future__ import annotations

from pathlib import Path

from apportion.models.loading import embeddings_of
from apportion.models.pretrained import named_positions
from apportion.models.reward import STATISTICS
from apportion.models.reward.loading import same_vocabulary
from apportion.models.text.render import encode, render
from apportion.models.text.template import check_template, renders_alike
from apportion.models.text.token_spans import PolicyText
from apportion.models.tokenizers import banned_ids
from apportion.stages.doctor.case import Case
from apportion.stages.doctor.checks.prompts import SAMPLE
from apportion.stages.doctor.checks.tokens import embedded
from apportion.stages.doctor.findings import FAIL, Result, combine, fail, ok, warn

UNLIMITED = 1 << 30  # tokens, where a model or tokenizer has no limit


def tokenizer(case: Case) -> Result:
    """The reward model can encode the policy's rollouts, and no id that it takes for padding is generated."""
    own = case.reward_tokenizer
    foreign = not same_vocabulary(case.tokenizer, own)
    policy = policy_text(case)
    templated = bool(policy.conversations) and bool(own.chat_template)
    by_text = foreign or (templated and not renders_alike(policy, own))
    result = as_text(case, foreign) if by_text else as_ids(case)
    if result.level == FAIL:
        return result
    changes = check_template("reward_model", own, policy) if by_text and templated else None
    changed = (
        ok("") if changes is None else warn(changes, "Look at the first scores of a run, or use a template without it.")
    )
    # the run warns of it as well
    other = (
        warn("", "Use one chat template for both, or check its first scores.") if by_text and not foreign else ok("")
    )
    return combine(result, other, template(case), changed)


def policy_text(case: Case) -> PolicyText:
    """Return the decoding of the policy's ids, with the run's conversations."""
    conversations = case.notes.get("conversations", {})
    return PolicyText(case.tokenizer, conversations, cuts=case.config.sampling.stop == "eos")


def as_ids(case: Case) -> Result:
    """Check a reward model with the policy's vocabulary, which scores ids."""
    own, text = case.reward_tokenizer, case.reward_settings.get_text_config()
    given = own.get_vocab().get(case.config.pad_token)
    pad = text.pad_token_id if given in (None, own.eos_token_id) else given
    # an EOS that also pads is skipped where the score is read, as the classifier itself does
    if pad is not None and pad not in (own.eos_token_id, *banned_ids(case.tokenizer, case.config.sampling.stop)):
        message = f"it pads with {own.convert_ids_to_tokens(pad)!r} ({pad}), which the policy can generate"
        fix = "Set its pad_token_id to the policy's: the score is taken at the last token that is not padding."
        return fail(message, fix)
    sampled = embeddings_of(case.policy_folder, case.policy_settings)  # ids without a logit are never sampled
    known = [[i for i in own.get_vocab().values() if i < sampled]]
    count = embeddings_of(case.reward_folder, case.reward_settings)
    embeddings = embedded(own, count, [*known, *case.rows], "reward model")
    if embeddings.level == FAIL:
        return embeddings
    limit = named_positions(text, "max_position_embeddings") or UNLIMITED
    message = f"the policy's vocabulary ({len(own)} tokens): it scores ids, up to {case.longest} of its {limit}"
    if case.longest > limit:
        return fail(message, "Lower sampling.max_new_tokens or max_prompt_tokens: its positions end there.")
    return ok(message)


def as_text(case: Case, foreign: bool = True) -> Result:
    """Check a reward model with its own tokenizer or template, which scores text: whether the longest prompts fit."""
    own, text = case.reward_tokenizer, case.reward_settings.get_text_config()
    same = len(set(own.get_vocab().items()) & set(case.tokenizer.get_vocab().items()))
    message = f"its own tokenizer ({same} of {len(own.get_vocab())} tokens shared with the policy): it scores text"
    message = message if foreign else "the policy's vocabulary and a chat template of its own: it scores text in that"
    if not own.is_fast:
        return fail(message, "Save it as a fast tokenizer, with a tokenizer.json.")
    count = embeddings_of(case.reward_folder, case.reward_settings)
    embeddings = embedded(own, count, (), "reward model")
    if embeddings.level == FAIL:
        return embeddings
    policy = policy_text(case)
    answer = case.tokenizer("a", add_special_tokens=False)["input_ids"]
    rows = sorted(case.rows, key=len)[-SAMPLE:]
    longest = max((len(encode(own, render(own, policy, row, answer), count).ids) for row in rows), default=0)
    positions = named_positions(text, "max_position_embeddings") or UNLIMITED
    limit, most = min(positions, own.model_max_length), longest - 1 + case.config.sampling.max_new_tokens
    message = f"{message}, up to about {most} tokens" + (f" of its {limit}" if limit < UNLIMITED else "")
    full = "Shorten the prompts, or lower sampling.max_new_tokens: a longer text is not truncated, but stops the run."
    if longest > positions:
        return fail(message, full)
    room = warn("", full) if most > limit else ok("")
    return combine(ok(message), room, embeddings if embeddings.fix else ok(""))


def template(case: Case) -> Result:
    """Check that a reward model with a chat template gets text in that template."""
    if not case.reward_tokenizer.chat_template or not all(isinstance(text, str) for text in case.texts):
        return ok("")
    if (Path(case.reward_folder) / STATISTICS).is_file():  # written by `apportion reward`: trained on plain text
        return ok("")
    fix = "Give prompts as conversations (lists of role and content) if it was trained on them."
    return warn("it has a chat template, and prompts are plain text", fix)
