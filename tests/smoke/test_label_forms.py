"""Labelled rows in the forms of public tools: read as they mean it, rendered, cut behind their prompts, or refused."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tiny
import tiny_tokenizers
from tokenizers.processors import TemplateProcessing

from apportion.cli.main import main
from apportion.config import RewardConfig
from apportion.data import BadRows, Labelled, Layout, labelled, labelled_splits
from apportion.data.label_rows import Render
from apportion.errors import ConfigError, DataError, ModelError
from apportion.models.text.bos import added_bos, starts_with_bos, without_bos
from apportion.models.text.labelled import chat_renderer, token_rows
from apportion.stages.reward.evaluation import token_ids
from apportion.stages.reward.excerpts import TokenRows, random_excerpts
from apportion.stages.reward.inputs import check_room

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETS = CHAT.replace("<{{ m.role }}>", "{% if m.role != 'developer' %}<{{ m.role }}>").replace(
    "<eos>{% endfor", "<eos>{% endif %}{% endfor"
)
TALK = [{"role": "user", "content": "How was it?"}, {"role": "assistant", "content": "Lovely."}]


def renderer(template: str | None = CHAT) -> Render:
    tokens = tiny.tokenizer()
    tokens.chat_template = template
    return chat_renderer(lambda: tokens)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path, *rows: dict[str, Any], layout: Layout = Layout(), **more: Any) -> list[Labelled]:  # noqa: B008
    return labelled(write(path / "a.jsonl", rows), layout=layout, render=renderer(), **more)


@pytest.mark.parametrize(
    ("row", "layout", "prompt", "text"),
    [
        ({"text": "Lovely.", "messages": TALK}, Layout(), "", "Lovely."),
        ({"prompt": "How was it?", "completion": " Lovely."}, Layout(), "How was it?", " Lovely."),
        ({"messages": TALK}, Layout(), "<user>How was it?<eos><assistant>", "Lovely.<eos>"),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, Layout(), "<user>How was it?<eos><assistant>", "Lovely.<eos>"),
        ({"messages": json.dumps(TALK)}, Layout(), "<user>How was it?<eos><assistant>", "Lovely.<eos>"),
        ({"text": "no", "review": "Lovely."}, Layout("review"), "", "Lovely."),
        ({"talk": TALK}, Layout("talk"), "<user>How was it?<eos><assistant>", "Lovely.<eos>"),
        ({"q": "How?", "a": "Fine."}, Layout("a", "q"), "How?", "Fine."),
        ({"q": "How?", "completion": "Fine."}, Layout(None, "q"), "How?", "Fine."),
        ({"text": json.dumps(TALK)}, Layout(), "", json.dumps(TALK)),  # a text that looks like one is a text
    ],
)
def test_every_form_is_read(tmp_path: Path, row: dict[str, Any], layout: Layout, prompt: str, text: str) -> None:
    for label in (True, False):
        rendered = prompt.startswith("<user>")
        expected = Labelled(prompt + text, int(label), len(prompt), rendered=rendered)
        assert read(tmp_path, row | {"label": label}, layout=layout) == [expected]


def test_columns_of_arrow_hold_nulls_and_encoded_values(tmp_path: Path) -> None:
    """Keys that only some messages have are null in the others; the template must not see them."""
    named = CHAT.replace("{{ m.content }}", "{% if m.name is defined %}({{ m.name }}){% endif %}{{ m.content }}")
    talks = [TALK, [{**TALK[0], "name": "Ann"}, TALK[1]]]
    labels = pyarrow.array(["1", "0"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"messages": talks, "label": labels}), tmp_path / "a.parquet")
    rows = labelled(str(tmp_path / "a.parquet"), render=renderer(named))
    assert [row.text for row in rows] == [
        "<user>How was it?<eos><assistant>Lovely.<eos>",
        "<user>(Ann)How was it?<eos><assistant>Lovely.<eos>",
    ]
    assert [row.label for row in rows] == [1, 0]
    for kind, values in ((pyarrow.int8(), [1, 0]), (pyarrow.float32(), [1.0, 0.0]), (pyarrow.bool_(), [True, False])):
        table = pyarrow.table({"text": ["a", "b"], "label": pyarrow.array(values, kind)})
        pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
        assert [row.label for row in labelled(str(tmp_path / "b.parquet"))] == [1, 0]


@pytest.mark.parametrize(
    ("row", "layout", "pieces"),
    [
        ({"review": "a", "label": 1}, Layout(), ["line 1: columns review, label", "Pass --text_column review"]),
        ({"Text": "a", "label": 1}, Layout(), ["Did you mean 'Text'? Pass --text_column Text"]),
        ({"text": "a", "sentiment": 1}, Layout(), ["a column 'label'", "Pass --label_column sentiment"]),
        ({"text": "a", "stars": 1}, Layout(None, None, "star"), ["a column 'star'", "Pass --label_column stars"]),
        ({"text": "a", "label": 1}, Layout("body"), ["a column 'body'", "Name the column with --text_column"]),
        ({"q": "a", "a": "b", "label": 1}, Layout("a", "p"), ["a column 'p'", "--prompt_column"]),
        ({"text": "a", "label": None}, Layout(), ["label = None", "Fill it in"]),
        ({"prompt": "a", "completion": " ", "label": 1}, Layout(), ["completion = ' '", "Fill it in"]),
        ({"prompt": "a", "completion": TALK, "label": 1}, Layout(), ["prompt = str, completion = list", "of one kind"]),
        ({"messages": "How?", "label": 1}, Layout(), ["messages = 'How?'", "a list of messages"]),
        ({"messages": [{"content": "x"}], "label": 1}, Layout(), ["each with its role"]),
        ({"messages": TALK[:1], "label": 1}, Layout(), ["line 1: the last turn is", "of role 'assistant'"]),
        ({"messages": [*TALK[:1], {"role": "assistant"}], "label": 1}, Layout(), ["line 1: messages[1]", "content"]),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, row: dict[str, Any], layout: Layout, pieces: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, row, layout=layout)
    assert all(piece in str(caught.value) for piece in ("data: got", "a.jsonl", *pieces)), caught.value


PAIRS = [{"chosen": "good", "rejected": "bad"}, {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": TALK[1:]}]


@pytest.mark.parametrize("row", PAIRS)
def test_preference_pairs_are_refused_where_labels_are_needed(tmp_path: Path, row: dict[str, Any]) -> None:
    for bad in (None, BadRows(lambda rows: None)):
        with pytest.raises(DataError, match="no preference pairs.*pairs are read by `apportion reward`"):
            read(tmp_path, *[row] * 4, bad=bad)


def test_a_label_of_another_scale_is_never_left_out(tmp_path: Path) -> None:
    """Of 1, 2 and of 0, 1, 2 the ones that look like labels would mean something else; an odd word is one bad row."""
    for labels in ([1, 2, 1, 2], [0, 1, 0, 1, 0, 2], ["1", "0", "-1"], [0.0, 1.0, 0.5]):
        rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
        with pytest.raises(DataError, match=r"label = .*in another scale, such as 1 to 5"):
            read(tmp_path, *rows, bad=BadRows(lambda rows: None))
    bad = BadRows(lambda rows: None)
    rows = [{"text": "a", "label": x} for x in (1, 0, "perhaps", None)]
    assert len(read(tmp_path, *rows, bad=bad)) == 2 and bad.count == 2


def test_a_message_or_an_answer_that_the_template_drops_is_named(tmp_path: Path) -> None:
    lost = [{"role": "developer", "content": "Be brief."}, *TALK]
    source = write(tmp_path / "a.jsonl", [{"messages": TALK, "label": 1}, {"messages": lost, "label": 0}])
    with pytest.raises(DataError, match=r"line 2: turn 1 \(role \\?'developer\\?'\): the chat template drops the text"):
        labelled(source, render=renderer(FORGETS))
    twice = [{"role": "developer", "content": "How was it?"}, *TALK]  # its text is there, from another message
    source = write(tmp_path / "a.jsonl", [{"messages": twice, "label": 1}])
    with pytest.raises(DataError, match=r"turn 1 \(role \\?'developer\\?'\)"):
        labelled(source, render=renderer(FORGETS))
    shouts = CHAT.replace("m.content }}", "m.content if m.role == 'user' else m.content | upper }}")
    for template in (shouts, CHAT + "{{ messages[-1].content }}"):
        with pytest.raises(DataError, match=r"turn 2 \(role 'assistant'\)"):
            labelled(write(tmp_path / "a.jsonl", [{"messages": TALK, "label": 1}]), render=renderer(template))
    with pytest.raises(DataError, match=r"line 1: a conversation of the roles user, assistant \(no such role"):
        labelled(source, render=renderer("{{ raise_exception('no such role') }}"))
    with pytest.raises(ModelError, match="without a chat template, and conversations in data"):
        labelled(source, render=renderer(None))
    with pytest.raises(DataError, match="no chat template is known here"):
        labelled(source)


def test_tools_and_template_settings_of_a_row_reach_the_template(tmp_path: Path) -> None:
    template = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{{ mood }}" + CHAT
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    row = {"messages": TALK, "label": 1, "tools": tools, "chat_template_kwargs": {"mood": "calm"}}
    (found,) = labelled(write(tmp_path / "a.jsonl", [row]), render=renderer(template))
    assert found.text[: found.prompt] == "[look_up]calm<user>How was it?<eos><assistant>"


@pytest.mark.parametrize("name", tiny_tokenizers.FAMILIES)
def test_ids_are_those_of_the_whole_text_and_the_prompt_is_its_start(name: str) -> None:
    tokens = tiny_tokenizers.FAMILIES[name]()
    draw = random.Random(0)
    words = [word for text in tiny.TEXTS for word in text.split()]
    rows = [Labelled("a film", 1)]
    for _ in range(40):
        prompt, text = (" ".join(draw.sample(words, draw.randint(1, 6))) for _ in range(2))
        joined = prompt + draw.choice(["", " ", "\n"])
        rows.append(Labelled(joined + text, 0, len(joined)))
    ids, starts = token_rows(rows, tokens, 99)
    for row, found, start in zip(rows, ids, starts, strict=True):
        assert found == tokens(row.text, add_special_tokens=False)["input_ids"]
        alone = tokens(row.text[: row.prompt], add_special_tokens=False)["input_ids"] if row.prompt else []
        assert found[:start] == alone[:start] and (start == len(alone) or found[start] != alone[start])
    assert starts[0] == 0 and token_rows([], tokens, 9) == ([], [])


def test_an_excerpt_is_the_whole_prompt_and_the_start_of_its_answer() -> None:
    rows = TokenRows([list(range(20)), list(range(100, 130))], [1, 0], [5, 0], [([], [])] * 2, False)
    excerpts = random_excerpts(rows, 200, [2, 6], 0)
    behind = [excerpt.ids for excerpt in excerpts if excerpt.label == 1]
    assert len(behind) == 100 and all(ids == list(range(len(ids))) for ids in behind)
    assert {len(ids) - 5 for ids in behind} == {2, 3, 4, 5, 6}
    windows = [excerpt.ids for excerpt in excerpts if excerpt.label == 0]
    assert {len(ids) for ids in windows} == {2, 3, 4, 5, 6} and len({ids[0] for ids in windows}) > 10


def test_a_prompt_without_room_behind_it_is_named_before_the_run() -> None:
    tokens = tiny.tokenizer()
    long = "film" + " film" * 30
    count = len(tokens(long)["input_ids"])
    config = RewardConfig(excerpt_tokens=[2, 8])
    rows = [Labelled(long + "!", 1, len(long)), Labelled(long, 0)]
    check_room(rows, token_ids(rows, tokens, config), 8, count + 8)
    with pytest.raises(DataError, match=f"{count} tokens before the answer, and 0 special ones: 'film film.*at most"):
        check_room(rows, token_ids(rows, tokens, config), 8, count + 7)
    with pytest.raises(DataError, match=r"0 tokens before the answer, and 2 special ones.*at most -1"):
        check_room(rows[1:], token_ids(rows[1:], tiny_tokenizers.wordpiece(), config), 8, 9)


def test_columns_and_splits_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    for layout, data, field in (
        (Layout("review"), "imdb", "text_column"),
        (Layout(None, None, "stars"), "imdb", "label_column"),
        (Layout(None, None, None, None, "test"), write(tmp_path / "a.jsonl", []), "test_split"),
    ):
        with pytest.raises(ConfigError, match=field):
            labelled_splits(data, None, 10, layout=layout)
    with pytest.raises(DataError, match="imdb with split 'test'"):
        labelled("imdb", layout=Layout(split="test"))
    assert Layout.of(RewardConfig(label_column="stars", split="test")) == Layout(None, None, "stars", "test", None)


def test_bos_is_written_once() -> None:
    tokens = tiny.tokenizer()
    assert added_bos(tokens) == "" and not starts_with_bos(tokens, "<unk>a")
    assert without_bos(tokens, "<unk>a") == "<unk>a"
    tokens.bos_token = "<unk>"
    assert added_bos(tokens) == "" and without_bos(tokens, "<unk>a") == "<unk>a"  # it is not added
    tokens.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A <eos>", special_tokens=SPECIAL)
    plain = tokens("a film")["input_ids"]
    assert added_bos(tokens) == "<unk>" and plain[0] == 2 and plain[-1] == 1
    assert tokens("<unk>a film")["input_ids"][:2] == [2, 2]  # transformers' own reading
    assert without_bos(tokens, "<unk>a film") == without_bos(tokens, "a film") == "a film"
    assert without_bos(tokens, "a <unk> film") == "a <unk> film" and starts_with_bos(tokens, "<unk>a")
    assert added_bos(tiny_tokenizers.wordpiece()) == ""  # a [CLS] inside a text stays a second one


def test_excerpts_have_the_special_tokens_of_a_text_once() -> None:
    """Also from the middle of a text, and where the text was written with BOS; not where a template made it."""
    tokens = tiny.tokenizer()
    tokens.bos_token = "<unk>"
    tokens.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=SPECIAL[:1])
    text = tiny.TEXTS[0]
    forms = {"plain": Labelled(text, 1), "own": Labelled("<unk>" + text, 1), "made": Labelled(text, 1, rendered=True)}
    found = {}
    for name, row in forms.items():
        rows = token_ids([row], tokens, RewardConfig(excerpt_tokens=[2, 6]))
        found[name] = [one.ids for one in random_excerpts(rows, 100, [2, 6], 0)]
    assert all(ids[0] == 2 and ids.count(2) == 1 for ids in found["plain"]) and found["own"] == found["plain"]
    behind = Labelled("<unk>" + text, 1, len("<unk>I rented this film"))
    rows = token_ids([behind], tokens, RewardConfig(excerpt_tokens=[2, 6]))
    for one in random_excerpts(rows, 20, [2, 6], 0):
        assert one.ids[0] == 2 and tokens.decode(one.ids[1:]).startswith("I rented this film") and one.ids.count(2) == 1
    assert found["plain"][0][1:] == found["made"][0] and not any(2 in ids for ids in found["made"])
    assert len({ids[1] for ids in found["plain"]}) > 5
    bert = tiny_tokenizers.wordpiece()
    rows = token_ids([forms["plain"]], bert, RewardConfig(excerpt_tokens=[2, 6]))
    ends = {(one.ids[0], one.ids[-1]) for one in random_excerpts(rows, 20, [2, 6], 0)}
    assert ends == {(bert.cls_token_id, bert.sep_token_id)}


SPECIAL = [("<unk>", 2), ("<eos>", 1)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and a reward model whose tokenizer writes BOS, and rows in three forms that one word decides."""
    folder = tmp_path_factory.mktemp("world")
    tokens = tiny.tokenizer()
    tokens.bos_token, tokens.chat_template = "<unk>", "<unk>" + CHAT
    tokens.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=SPECIAL[:1])
    for name, save in (("base", tiny.save_policy), ("reward", tiny.save_reward)):
        tokens.save_pretrained(save(folder / name))
    answers = [("great", True), ("boring", False)]
    rows = [(f"Film {i}?", f" {answers[i % 2][0]} it was", answers[i % 2][1]) for i in range(160)]
    write(folder / "kto.jsonl", [{"prompt": q, "completion": a, "label": good} for q, a, good in rows])
    talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a, _ in rows]
    write(folder / "talks.jsonl", [{"messages": t, "label": good} for t, (_, _, good) in zip(talks, rows, strict=True)])
    write(folder / "flags.jsonl", [{"review": f"<unk>{q}{a}", "stars": float(good)} for q, a, good in rows])
    return folder


COLUMNS = ("--text_column", "review", "--label_column", "stars")


@pytest.mark.parametrize(("name", "more"), [("kto", ()), ("talks", ()), ("flags", COLUMNS)])
def test_a_reward_model_learns_from_each_form_and_the_doctor_reads_it(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, more: tuple[str, ...]
) -> None:
    data = str(world / f"{name}.jsonl")
    words = ["--model", str(world / "base"), "--data", data, *more, "--excerpt_tokens", "[3, 8]"]
    assert main(["doctor", "--stage", "reward", *words, "--json"]) == 0
    findings = {one["name"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["labels"]["level"] == "ok" and "of 1" in findings["labels"]["message"]
    begins = 0 if name == "kto" else 160
    message = f"BOS '<unk>' begins {begins} of 160 texts, and is written once in all"
    assert findings["beginning of text"]["message"] == message
    assert ("prompts of up to" in findings["excerpts"]["message"]) == (name != "flags")
    training = ["--excerpts", "320", "--probe_excerpts", "64", "--batch_size", "16", "--lora.rank", "2", "--optim.lr"]
    output = ["3e-3", "--dtype", "float32", "--device", "cpu", "--output", str(tmp_path / "run")]
    assert main(["reward", *words, *training, *output]) == 0
    warned = capsys.readouterr().err
    assert ("160 of 160 texts begin with BOS '<unk>'" in warned) == bool(begins)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    if name != "flags":  # windows of the middle may lack the word that decides; behind a prompt none does
        assert found["accuracy"]["mean"] > 0.9, found["accuracy"]


def test_credit_reads_a_text_with_its_own_bos_as_without(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for prompt, text in (("", "a great film"), ("", "<unk>a great film"), ("So:", " a film"), ("<unk>So:", " a film")):
        words = ["--model", str(world / "reward"), "--text", text, "--prompt", prompt, "--method", "[sparse]", "--json"]
        assert main(["credit", *words]) == 0
        done = capsys.readouterr()
        found.append(json.loads(done.out))
        assert ("begins with <unk>, which is written once" in done.err) == ("<unk>" in prompt + text)
    assert found[0] == found[1] and found[2] == found[3] and found[0]["score"] != found[2]["score"]
    assert main(["credit", "--model", str(world / "reward"), "--text", "<unk>"]) == 2
