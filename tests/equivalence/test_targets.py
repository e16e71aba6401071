"""Targets of the loss: the answers and their ends, in every template, and the ids that a prompt is sampled from."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import trainer_runs
from chat_templates import TEMPLATES
from trainer_runs import assistant, user

from apportion.data.answers import Demonstration, Pair
from apportion.data.conversations import Conversation
from apportion.errors import DataError, ModelError
from apportion.models.text.chat import render_conversation
from apportion.models.text.targets import Limits, Target, TargetEncoder

EOS = 1
TALK = [user("plomvit wants"), assistant("grelsk answers"), user("dranfo again"), assistant("flondry good")]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"t": "X"}}}],
}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "minus vrelt"}


def tokens_of(template: str | None) -> Any:
    made = tiny.tokenizer()
    made.add_special_tokens({"bos_token": "<s>"})
    made.chat_template = template
    return made


def encoder(tokenizer: Any, length: int = 1000, overlong: str = "drop", **more: Any) -> TargetEncoder:
    return TargetEncoder("data", tokenizer, (EOS,), Limits(length, overlong), **more)


def shown(tokenizer: Any, target: Target) -> list[str]:
    """Return the text of each run of ids that the loss counts."""
    parts: list[list[int]] = []
    before = False
    for one, on in zip(target.ids, target.mask, strict=True):
        if on and not before:
            parts.append([])
        if on:
            parts[-1].append(one)
        before = on
    return [tokenizer.decode(part) for part in parts]


def conversation(turns: list[dict[str, Any]], prompt: int = 0, **more: Any) -> Demonstration:
    return Demonstration(Conversation(turns, **more), prompt, "row 1")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_answer_is_a_target_that_starts_where_it_is_sampled(name: str) -> None:
    """What stands before it is the prompt that `rl` samples from, id for id; it ends with an end."""
    tokenizer = tokens_of(TEMPLATES[name])
    target = encoder(tokenizer).encode(conversation(TALK, 3))
    assert target is not None
    prompt = render_conversation("prompts", tokenizer, Conversation(TALK[:-1]), where="").text
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = render_conversation("data", tokenizer, Conversation(TALK), where="", generation=False).text
    [answer] = shown(tokenizer, target)
    assert "flondry good" in answer and "grelsk" not in answer and "dranfo" not in answer
    if whole.startswith(prompt):  # a template may render an answer otherwise than it begins one (Harmony's channels)
        assert target.ids[: target.first] == ids
    kept = [one for one in target.ids if tokenizer.decode([one]).strip()]
    assert kept[-1] == EOS and target.mask[-1]
    assert tokenizer.decode(target.ids).startswith(whole.rstrip()) or tokenizer.decode(target.ids) == whole


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_of_a_conversation_counts_with_its_end_or_is_counted_as_left_out(name: str) -> None:
    tokenizer = tokens_of(TEMPLATES[name])
    made = encoder(tokenizer)
    target = made.encode(conversation(TALK))
    assert target is not None
    texts = shown(tokenizer, target)
    assert "flondry good" in texts[-1] and not any("plomvit" in text or "dranfo" in text for text in texts)
    if len(texts) == 2:
        assert "grelsk answers" in texts[0] and texts[0].rstrip().endswith("<eos>") and not made.counts.turns_left_out
    else:  # the template writes another end, which this tokenizer does not have
        assert len(texts) == 1 and made.counts.turns_left_out == 1
        assert "<eos>" not in tokenizer.decode(target.ids)[:-10]


def test_templates_whose_end_is_eos_count_both_answers() -> None:
    """So that the test above is no empty one."""
    counted = {
        name for name in TEMPLATES
        if len(shown(tokens_of(TEMPLATES[name]), encoder(tokens_of(TEMPLATES[name])).encode(conversation(TALK)))) == 2  # type: ignore[arg-type]
    }  # fmt: skip
    assert {"llama 2", "mistral 0.3, tools"} <= counted


@pytest.mark.parametrize("ends", ["<|im_end|>", "<|eot_id|>"])
def test_the_models_own_ends_count_as_ends(ends: str) -> None:
    """A template whose turns end at an id of the generation settings gets no further EOS."""
    name = "qwen 3" if ends == "<|im_end|>" else "llama 3"
    tokenizer = tokens_of(TEMPLATES[name])
    tokenizer.add_special_tokens({"additional_special_tokens": [ends]})
    made = encoder(tokenizer)
    made.ends = (EOS, tokenizer.convert_tokens_to_ids(ends))
    target = made.encode(conversation(TALK))
    assert target is not None and EOS not in target.ids and made.counts.ends_added == 0
    assert [text.strip().endswith(ends) for text in shown(tokenizer, target)] == [True, True]


def test_thoughts_of_an_earlier_answer_that_the_template_drops() -> None:
    tokenizer = tokens_of(TEMPLATES["qwen 3"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    made = encoder(tokenizer)
    made.ends = (EOS, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    thinking = [TALK[0], assistant("<think>\nhmm\n</think>\n\ngrelsk answers"), *TALK[2:]]
    target = made.encode(conversation(thinking))
    assert target is not None and "hmm" not in tokenizer.decode(target.ids)
    first, last = shown(tokenizer, target)
    assert first.strip() == "grelsk answers<|im_end|>" and "flondry good" in last


@pytest.mark.parametrize("name", ["qwen 2.5", "qwen 3", "llama 3.1", "mistral 0.3, tools"])
def test_tool_calls_and_system_turns(name: str) -> None:
    """Calls of the assistant are targets, results and system turns are not; a row may end with a call."""
    tokenizer = tokens_of(TEMPLATES[name])
    ending = {"qwen": "<|im_end|>", "llam": "<|eot_id|>", "mist": "</s>"}[name[:4]]
    tokenizer.add_special_tokens({"additional_special_tokens": [ending]})
    ends = (EOS, tokenizer.convert_tokens_to_ids(ending))
    system = [] if name.startswith("mistral") else [{"role": "system", "content": "be zuntly"}]
    turns = [*system, user("plomvit wants"), CALL, RESULT, assistant("flondry good")]
    made = encoder(tokenizer)
    made.ends = ends
    target = made.encode(conversation(turns, tools=[TOOL]))
    assert target is not None
    call, answer = shown(tokenizer, target)
    assert "weather" in call and "X" in call and "flondry good" in answer
    assert not any(word in call + answer for word in ("zuntly", "plomvit", "vrelt"))
    last = made.encode(conversation(turns[:-2], tools=[TOOL]))
    assert last is not None and "weather" in shown(tokenizer, last)[-1]


def test_texts_end_with_eos_once() -> None:
    tokenizer, made = tokens_of(None), encoder(tokens_of(None))
    for text in ("A film.", "A film.<eos>"):
        target = made.encode(Demonstration(text))
        assert target is not None and target.ids.count(EOS) == 1 and target.ids[-1] == EOS and all(target.mask)
    target = made.encode(Demonstration("A film: fine.", len("A film:")))
    assert target is not None and shown(tokenizer, target) == [" fine.<eos>"] and target.key == "A film:"
    everything = encoder(tokenizer, completion_only=False).encode(Demonstration("A film: fine.", 7))
    assert everything is not None and all(everything.mask)
    assert made.counts.ends_added == 2


def test_a_token_over_the_border_belongs_to_the_answer() -> None:
    tokenizer = tokens_of(None)
    assert len(tokenizer(" film")["input_ids"]) == 1  # so that the prompt's last character is no token of its own
    target = encoder(tokenizer).encode(Demonstration("This film", len("This fi")))
    assert target is not None and shown(tokenizer, target) == [" film<eos>"]


def test_rows_over_the_limit_are_left_out_or_cut_and_counted() -> None:
    tokenizer = tokens_of(None)
    long = Demonstration("A film: " + "fine " * 30, 7)
    made = encoder(tokenizer, 12)
    assert made.encode(long) is None and made.counts.overlong == 1
    made = encoder(tokenizer, 12, "truncate")
    target = made.encode(long)
    assert target is not None and len(target.ids) == len(target.mask) == 12 and EOS not in target.ids
    with pytest.raises(DataError, match="tokens before the answer"):
        made.encode(Demonstration("fine " * 30 + "film", 150))
    pair = Pair(long, Demonstration("A film: bad", 7, "row 1"))
    cut = made.encode_pair(pair)
    assert cut is not None and len(cut.prompt_ids + cut.chosen_ids) == 12 and cut.rejected_ids[-1] == EOS
    assert encoder(tokenizer, 12).encode_pair(pair) is None


def test_equal_pairs_are_left_out_and_counted() -> None:
    made = encoder(tokens_of(None))
    one = Demonstration("A film: fine", 7, "row 1")
    assert made.encode_pair(Pair(one, one)) is None and made.counts.equal == 1


def test_pairs_share_their_prompts_ids() -> None:
    tokenizer = tokens_of(trainer_runs.TEMPLATE)
    made = encoder(tokenizer)
    question = user("How?")
    pair = made.encode_pair(Pair(*(conversation([question, assistant(text)], 1) for text in ("Fine.", "No."))))
    assert pair is not None and tokenizer.decode(pair.prompt_ids) == "<user>How?<eos><assistant>"
    assert tokenizer.decode(pair.chosen_ids) == "Fine.<eos>" and tokenizer.decode(pair.rejected_ids) == "No.<eos>"


def test_what_cannot_be_a_target_is_refused_by_row() -> None:
    with pytest.raises(ModelError, match="chat template"):
        encoder(tokens_of(None)).encode(conversation(TALK))
    moving = tokens_of("{% for m in messages %}{{ m.content | upper }}<eos>{% endfor %}")
    with pytest.raises(DataError, match="row 1"):
        encoder(moving).encode(conversation(TALK))
    made = encoder(tokens_of(None))
    made.limits.embeddings = 50
    with pytest.raises(DataError, match="below the model's 50 embeddings"):
        made.encode(Demonstration("A wonderful film", 0, "row 1"))


def test_variables_of_the_setting_reach_the_template_and_a_rows_own_win() -> None:
    template = "{{ mood }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    tokenizer = tokens_of(template)
    made = encoder(tokenizer, variables={"mood": "calm"})
    one = made.encode(conversation(TALK))
    other = made.encode(conversation(TALK, template_kwargs={"mood": "loud"}))
    assert one is not None and tokenizer.decode(one.ids).startswith("calm<user>")
    assert other is not None and tokenizer.decode(other.ids).startswith("loud<user>")
