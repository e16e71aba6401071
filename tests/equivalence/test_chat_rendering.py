"""Conversations as their chat template renders them: equal to transformers', and every turn's text looked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from apportion.config import SamplingConfig
from apportion.data import Conversation, labelled, read_prompts
from apportion.errors import ConfigError, DataError
from apportion.generation.prompts import encode_prompts
from apportion.models.text.chat import apply_template, as_text, check_variables, render_conversation, with_response
from apportion.models.text.labelled import chat_renderer
from apportion.models.text.render import render
from apportion.models.text.template import renders_alike
from apportion.models.text.token_spans import PolicyText

ASKS = "{% if add_generation_prompt %}[assistant]{% endif %}"
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}" + ASKS
TRIMS = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }};{% endfor %}" + ASKS
STRICT = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}[{{ m.role }}]{{ m.content }};{% endif %}"
    "{% endfor %}" + ASKS
)
FIRST = (  # a system turn is shown where it is the first
    "{% if messages[0].role == 'system' %}[system]{{ messages[0].content }};{% endif %}"
    "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }};{% endfor %}" + ASKS
)
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %};{% endfor %}" + ASKS
)
BOTH = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% elif m.content %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% for c in m.tool_calls or [] %}"
    "<{{ c.function.name }} {{ c.function.arguments | tojson }}>{% endfor %};{% endfor %}" + ASKS
)
NAMES = BOTH.replace(" {{ c.function.arguments | tojson }}", "")
THINKING = (  # as Qwen 3: thoughts of earlier turns are left out, and a switch
    "{% if tools %}[tools]{% for t in tools %}{{ t | tojson }}{% endfor %};{% endif %}{% for m in messages %}"
    "[{{ m.role }}]{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %};{% endfor %}" + ASKS + "{% if add_generation_prompt and enable_thinking is "
    "defined and not enable_thinking %}<think></think>{% endif %}"
)
ASK = {"role": "user", "content": "is it cold"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": 'Bern "old"', "days": 2}}}


def templated(template: str) -> Any:
    made = tiny.tokenizer()
    made.chat_template = template
    return made


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (PLAIN, [ASK]),
        (PLAIN, [{"role": "system", "content": ""}, {"role": "user", "content": "  spaces \n\n inside "}]),
        (TRIMS, [{"role": "user", "content": "  spaces \n\n around "}]),
        (PLAIN, [{"role": "user", "content": "user"}, {"role": "assistant", "content": "no"}, ASK]),
        (PLAIN, [ASK, ASK]),
        (BOTH, [{"role": "user", "content": [part("is it"), part(" cold")]}, {"role": "user", "content": []}]),
        (BOTH, [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": ""}]),
        (BOTH, [ASK, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "minus four"}]),
        (PARTS, [{"role": "user", "content": [part("is it cold")]}]),
        (THINKING, [ASK, {"role": "assistant", "content": "<think>hm\n</think>\n\nyes"}, ASK]),
        (THINKING, [ASK, {"role": "assistant", "content": "<think>hm</think>"}, ASK]),
    ],
)
def test_it_is_what_transformers_renders(template: str, turns: list[dict[str, Any]]) -> None:
    tokenizer = templated(template)
    found = render_conversation("prompts", tokenizer, turns)
    assert found.text == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert found.turns == turns and found.hidden == []


def test_tools_and_variables_reach_the_template() -> None:
    tokenizer = templated(THINKING)
    tool = {"type": "function", "function": {"name": "weather", "description": "is it cold"}}
    found = render_conversation("prompts", tokenizer, Conversation([ASK], [tool], {"enable_thinking": False}))
    assert found.text == tokenizer.apply_chat_template(
        [ASK], tools=[tool], enable_thinking=False, tokenize=False, add_generation_prompt=True
    )
    assert found.text.startswith("[tools]") and found.text.endswith("[assistant]<think></think>")
    assert (found.turns.tools, found.turns.template_kwargs) == ([tool], {"enable_thinking": False})


@pytest.mark.parametrize(
    ("template", "turns", "turn", "lost"),
    [
        (STRICT, [{"role": "developer", "content": "rhyme"}, ASK], "turn 1 (role 'developer')", "the text 'rhyme'"),
        (STRICT, [{"role": "human", "content": "is it cold"}], "turn 1 (role 'human')", "the text 'is it cold'"),
        (STRICT, [{"role": "User", "content": "is it cold"}], "turn 1 (role 'User')", "the text 'is it cold'"),
        (STRICT, [ASK, {"role": "tool", "content": "minus four"}], "turn 2 (role 'tool')", "the text 'minus four'"),
        (FIRST, [ASK, {"role": "system", "content": "in rhyme"}], "turn 2 (role 'system')", "the text 'in rhyme'"),
        # elsewhere by coincidence: in another turn, in a word of the template, twice
        (STRICT, [ASK, {"role": "tool", "content": "cold"}], "turn 2 (role 'tool')", "the text 'cold'"),
        (STRICT, [{"role": "tool", "content": "assist"}, ASK], "turn 1 (role 'tool')", "the text 'assist'"),
        (STRICT, [ASK, {"role": "tool", "content": "is it cold"}], "turn 2 (role 'tool')", "the text 'is it cold'"),
        (STRICT, [ASK, {"role": "tool", "content": "?"}], "turn 2 (role 'tool')", "the text '?'"),
        # changed: a part of it is lost
        ("{% for m in messages %}{{ m.content[:8] }}{% endfor %}", [ASK], "turn 1 (role 'user')", "is it cold"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", [ASK], "turn 1 (role 'user')", "is it cold"),
        (
            "{% for m in messages %}{{ m.content[0].text }}{% endfor %}",
            [{"role": "user", "content": [part("is it"), part(" cold")]}],
            "turn 1 (role 'user')", "the part 'cold'",
        ),
        # a template that knows no tool calls, and one that shows either the call or the text
        (
            PLAIN, [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}, ASK],
            "turn 2", "the tool call 'weather'",
        ),
        (
            "{% for m in messages %}{% if m.tool_calls %}<{{ m.tool_calls[0].function.name }}>{% else %}{{ m.content }}"
            "{% endif %}{% endfor %}",
            [ASK, {"role": "assistant", "content": "let me see", "tool_calls": [CALL]}, ASK],
            "turn 2 (role 'assistant')", "the text 'let me see'",
        ),
        # only thoughts may be left out
        (
            THINKING.replace(".lstrip", "[5:].lstrip"),
            [ASK, {"role": "assistant", "content": "<think>a</think>answer"}, ASK],
            "turn 2 (role 'assistant')", "the text 'answer'",
        ),
    ],
)  # fmt: skip
def test_a_text_that_is_lost_is_named(template: str, turns: list[dict[str, Any]], turn: str, lost: str) -> None:
    with pytest.raises(DataError) as caught:
        render_conversation("prompts", templated(template), turns, where="p.jsonl, line 3")
    for piece in ("prompts: got", f"p.jsonl, line 3: {turn}", lost, "every turn's text", "skip_bad_rows"):
        assert piece in str(caught.value), str(caught.value)


def test_contents_take_the_form_that_the_template_knows() -> None:
    """Strings for a template of parts, joined parts for a template of strings: each as transformers renders it."""
    strings, parts = [ASK], [{"role": "user", "content": [part("is it"), part(" cold")]}]
    found = render_conversation("prompts", templated(PARTS), strings)
    assert found.text == "[user]is it cold;[assistant]"
    assert found.turns == [{"role": "user", "content": [part("is it cold")]}]
    assert as_text(found.turns) == strings
    for template in (PLAIN, TRIMS, "{{ messages[0]['content'] + ';' }}" + ASKS):
        found = render_conversation("prompts", templated(template), parts)
        assert "is it cold;" in found.text and "{" not in found.text and found.turns == strings
    called = [ASK, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "ok"}]
    strict = (
        "{% for m in messages %}{{ m.content + '' }}{{ m.tool_calls[0].function.name if m.tool_calls }}{% endfor %}"
    )
    assert render_conversation("prompts", templated(strict), called).text == "is it coldweatherok"
    one_of_each = [{"role": "system", "content": "in rhyme"}, *parts]
    assert render_conversation("prompts", templated(PLAIN), one_of_each).text == (
        "[system]in rhyme;[user]is it cold;[assistant]"
    )


def test_arguments_that_are_not_shown_are_listed() -> None:
    turns = [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "ok"}]
    assert render_conversation("prompts", templated(BOTH), turns).hidden == []
    assert render_conversation("prompts", templated(NAMES), turns).hidden == ["the argument 'Bern \"old\"'"]
    text = {"function": {"name": "weather", "arguments": '{"town": "Bern"}'}}
    turns[1] = {"role": "assistant", "tool_calls": [text]}
    assert render_conversation("prompts", templated(BOTH), turns).hidden == []


@pytest.mark.parametrize("template", [PLAIN, TRIMS, BOTH, PARTS])
@pytest.mark.parametrize("begun", ["It is", "", "It is "])
def test_a_last_turn_of_the_assistant_is_continued(template: str, begun: str) -> None:
    tokenizer = templated(template)
    found = render_conversation("prompts", tokenizer, [ASK, {"role": "assistant", "content": begun}])
    shown = begun.strip() if template == TRIMS else begun
    assert found.text == f"[user]is it cold;[assistant]{shown}"
    answered = with_response(found.turns, " cold.")
    whole = f"{begun} cold.".strip() if template == TRIMS else f"{begun} cold."
    assert apply_template(tokenizer, answered, generation=False).endswith(f"[assistant]{whole};")
    assert len(answered) == 2
    plain = with_response([ASK], "yes")
    assert plain == [ASK, {"role": "assistant", "content": "yes"}]


def test_a_template_that_fails_is_named_with_the_row() -> None:
    with pytest.raises(DataError, match=r"p\.jsonl, line 2: a conversation of the roles user \(no such role\)"):
        render_conversation(
            "prompts", templated("{{ raise_exception('no such role') }}"), [ASK], where="p.jsonl, line 2"
        )


def test_a_template_that_refuses_marks_is_still_checked() -> None:
    """Its texts are looked for themselves, so that a coincidence is not found out, but a loss is."""
    known = "{% for m in messages %}{% if m.content not in ('yes', 'no') %}{{ raise_exception('what') }}{% endif %}"
    shows = known + "[{{ m.role }}]{{ m.content }}{% endfor %}"
    turns = [{"role": "user", "content": "yes"}]
    assert render_conversation("prompts", templated(shows), turns).text == "[user]yes"
    with pytest.raises(DataError, match="drops the text 'yes'"):
        render_conversation("prompts", templated(known + "{% endfor %}"), turns)


def test_variables_that_the_template_does_not_have_are_refused() -> None:
    check_variables("sampling.chat_template_kwargs", templated(THINKING), {"enable_thinking": False})
    with pytest.raises(ConfigError, match="'enable_thinkin'.*Did you mean 'enable_thinking'"):
        check_variables("sampling.chat_template_kwargs", templated(THINKING), {"enable_thinkin": False})
    with pytest.raises(ConfigError, match="'add_generation_prompt'; expected a variable"):
        check_variables("sampling.chat_template_kwargs", templated(THINKING), {"add_generation_prompt": False})


def test_a_whole_conversation_is_rendered_with_its_answer() -> None:
    """Without a generation prompt, for whatever trains on it."""
    tokenizer, turns = templated(PLAIN), [ASK, {"role": "assistant", "content": "yes"}]
    found = render_conversation("data", tokenizer, turns, generation=False)
    assert found.text == tokenizer.apply_chat_template(turns, tokenize=False) == "[user]is it cold;[assistant]yes;"
    with pytest.raises(DataError, match="turn 1 .role 'tool'.: the chat template drops the text 'ok'"):
        render_conversation("data", templated(STRICT), [{"role": "tool", "content": "ok"}, *turns], generation=False)


def test_tools_and_variables_of_a_row_reach_every_rendering(tmp_path: Path) -> None:
    """As prompts of a run, labelled texts, pairs, and in a reward model's own template; a row without them has none."""
    head = "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}{% if mood %}({{ mood }}){% endif %}"
    policy, reward = templated(head + PLAIN), templated("!" + head + PLAIN)
    answers = [{"role": "assistant", "content": text} for text in ("a good cast", "no")]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    more = {"tools": tools, "chat_template_kwargs": {"mood": "calm"}}
    start, plain = "<weather>(calm)[user]is it cold;[assistant]", "[user]is it cold;[assistant]"
    files = {
        "prompts": [{"prompt": [ASK], **more}, {"prompt": [ASK]}],
        "texts": [{"messages": [ASK, answers[0]], "label": 1, **more}, {"messages": [ASK, answers[1]], "label": 0}],
        "pairs": [{"prompt": [ASK], "chosen": answers[:1], "rejected": answers[1:], **more}],
    }
    for name, rows in files.items():
        (tmp_path / name).with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = encode_prompts(
        read_prompts(str(tmp_path / "prompts.jsonl")), policy, SamplingConfig(prompt_tokens=None), 0, 512
    )
    assert [policy.decode(row) for row in found.rows] == [start, plain]
    for name in ("texts", "pairs"):
        rows = labelled(str(tmp_path / f"{name}.jsonl"), render=chat_renderer(lambda: policy), pairs=True)
        starts = [start, start if name == "pairs" else plain]
        assert [(row.text[: row.prompt], row.text[row.prompt :]) for row in rows] == [
            (starts[0], "a good cast;"),
            (starts[1], "no;"),
        ]
    texts = PolicyText(policy, found.conversations)
    response = policy("a good cast", add_special_tokens=False)["input_ids"]
    assert [render(reward, texts, row, response).text for row in found.rows] == [
        f"!{start}a good cast;",
        f"!{plain}a good cast;",
    ]
    # by ids only where tools and variables are rendered alike as well
    assert renders_alike(texts, templated(head + PLAIN + "{# another #}"))
    assert not renders_alike(texts, templated(PLAIN)) and not renders_alike(texts, reward)
