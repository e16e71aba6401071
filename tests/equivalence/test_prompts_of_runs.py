"""Prompts of a run as ids: limits, rows that are left out, one BOS, their order, and the rows that they come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
from tokenizers.processors import TemplateProcessing

from apportion.config import SamplingConfig
from apportion.data import BadRows, Conversation, Prompt
from apportion.errors import ConfigError, DataError
from apportion.generation.prompts import encode_prompts
from apportion.stages.rl.sources import PolicySource

WHOLE = SamplingConfig(prompt_tokens=None, max_new_tokens=4)
CONTEXT = 24
TEMPLATE = (
    "{% for m in messages if m.role != 'tool' %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if quick %}!{% endif %}{% endif %}"
)


def given(contents: Sequence[Any]) -> list[Prompt]:
    return [Prompt(content, f"p.jsonl, line {i}") for i, content in enumerate(contents, 1)]


def with_bos() -> Any:
    made = tiny.tokenizer()
    made.add_special_tokens({"bos_token": "<unk>"})
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    return made


def collected() -> tuple[BadRows, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    return BadRows(rows.extend), rows


class TestLimits:
    TEXTS = ("a film", "film" + " film" * 30, "a story", "film" + " film" * 31)

    def test_one_error_names_all_that_do_not_fit(self) -> None:
        lengths = [len(tiny.tokenizer()(text)["input_ids"]) for text in self.TEXTS]
        assert max(lengths[0], lengths[2]) <= 20 < min(lengths[1], lengths[3])
        with pytest.raises(DataError) as caught:
            encode_prompts(given(self.TEXTS), tiny.tokenizer(), WHOLE, 0, CONTEXT)
        message = str(caught.value)
        for piece in (
            f"prompt 2: got '{lengths[1]} tokens: film film", "(p.jsonl, line 2); 2 of 4 do not fit",
            f"also prompt 4 ({lengths[3]} tokens, p.jsonl, line 4)", "1 to 20 tokens", "context 24", "Shorten it",
            "skip_bad_rows: true",
        ):  # fmt: skip
            assert piece in message, message

    def test_they_are_left_out_counted_and_listed(self) -> None:
        bad, rows = collected()
        found = encode_prompts(given(self.TEXTS), tiny.tokenizer(), WHOLE, 0, CONTEXT, bad)
        bad.flush()
        assert found.texts == ["a film", "a story"] and found.rows == [
            tiny.tokenizer()(t)["input_ids"] for t in found.texts
        ]
        assert [(row["where"], row["setting"]) for row in rows] == [
            ("p.jsonl, line 2", "prompts"), ("p.jsonl, line 4", "prompts"),
        ]  # fmt: skip
        assert all("1 to 20 tokens" in row["why"] and json.loads(row["row"])["prompt"] in self.TEXTS for row in rows)

    def test_an_empty_prompt_is_one_of_them(self) -> None:
        made = tiny.tokenizer()
        made.chat_template = "{{ '' }}{% if messages[0].role != 'user' %}{{ messages[0].content }}{% endif %}"
        empty = Conversation([{"role": "user", "content": "", "reasoning": "x"}])
        with pytest.raises(DataError, match="prompt 1: got .0 tokens"):
            encode_prompts(given([empty]), made, WHOLE, 0, CONTEXT)

    def test_more_that_do_not_fit_than_fit_are_an_error(self) -> None:
        with pytest.raises(DataError, match=r"p\.jsonl: 2 of 3 rows cannot be used.*The first of them: prompt 1"):
            encode_prompts(given(self.TEXTS[1:]), tiny.tokenizer(), WHOLE, 0, CONTEXT, collected()[0])

    def test_without_room_for_a_response_nothing_fits(self) -> None:
        with pytest.raises(ConfigError, match="max_new_tokens: got 4; expected less than the policy's context of 4"):
            encode_prompts(given(["a"]), tiny.tokenizer(), WHOLE, 0, 4)

    def test_the_first_count_usable_ones(self) -> None:
        bad, _ = collected()
        found = encode_prompts(given([*self.TEXTS, "a cast", "more"]), tiny.tokenizer(), WHOLE, 0, CONTEXT, bad, 3)
        assert found.texts == ["a film", "a story", "a cast"] and bad.count == 2
        with pytest.raises(DataError, match="prompt 2: got"):
            encode_prompts(given(self.TEXTS), tiny.tokenizer(), WHOLE, 0, CONTEXT, None, 3)
        assert encode_prompts(given(self.TEXTS), tiny.tokenizer(), WHOLE, 0, CONTEXT, None, 1).texts == ["a film"]


def test_cut_prompts_are_the_first_tokens_of_a_seeded_number() -> None:
    texts, sampling = tiny.TEXTS * 3, SamplingConfig(prompt_tokens=[2, 6])
    found = encode_prompts(given(texts), tiny.tokenizer(), sampling, 7, 128)
    cuts = torch.randint(2, 7, (len(texts),), generator=torch.Generator().manual_seed(7)).tolist()
    assert len(set(cuts)) > 2
    ids = [tiny.tokenizer()(text)["input_ids"][:cut] for text, cut in zip(texts, cuts, strict=True)]
    assert found.rows == encode_prompts(given(texts), tiny.tokenizer(), sampling, 7, None).rows == ids


class TestBeginning:
    TEXTS = ("a film", "<unk>a film", "a story", "<unk>a cast")

    def test_a_second_one_is_refused(self) -> None:
        message = r"beginning of text: got .*BOS '<unk>' \(2\) begins prompts twice in 2 of 4: prompt 2 \(\d+ tokens, "
        with pytest.raises(DataError, match=message + r"p\.jsonl, line 2\), prompt 4.*adds one already"):
            encode_prompts(given(self.TEXTS), with_bos(), WHOLE, 0, CONTEXT)

    def test_such_rows_are_left_out(self) -> None:
        bad, rows = collected()
        found = encode_prompts(given(self.TEXTS), with_bos(), WHOLE, 0, CONTEXT, bad)
        bad.flush()
        assert found.texts == ["a film", "a story"] and all(row[:1] == [2] and row[1] != 2 for row in found.rows)
        assert all("twice" in row["why"] for row in rows) and len(rows) == 2

    def test_a_template_writes_its_own(self) -> None:
        made = with_bos()
        made.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
        found = encode_prompts(given([Conversation([{"role": "user", "content": "a film"}])]), made, WHOLE, 0, CONTEXT)
        assert found.rows == [made("a film")["input_ids"]] and found.rows[0].count(2) == 1


class TestConversations:
    def made(self) -> Any:
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = TEMPLATE
        return tokenizer

    def test_they_are_rendered_and_kept_as_text(self) -> None:
        parts = Conversation([{"role": "user", "content": [{"type": "text", "text": "cold"}]}])
        tokenizer = self.made()
        found = encode_prompts(given([parts, "plain"]), tokenizer, WHOLE, 0, CONTEXT)
        ids = tokenizer("[user]cold[assistant]")["input_ids"]
        assert found.rows == [ids, tokenizer("plain")["input_ids"]]
        assert found.conversations == {tuple(ids): [{"role": "user", "content": "cold"}]}
        cut = encode_prompts(given([parts, "plain"]), tokenizer, SamplingConfig(prompt_tokens=[2, 2]), 0, 128)
        assert cut.rows[0] == ids[:2] and cut.conversations == {}

    def test_a_rows_variables_win_over_the_settings(self) -> None:
        turns, tokenizer = [{"role": "user", "content": "cold"}], self.made()
        sampling = WHOLE.model_copy(update={"chat_template_kwargs": {"quick": True}})
        own = Conversation(turns, None, {"quick": False})
        found = encode_prompts(given([Conversation(turns), own]), tokenizer, sampling, 0, CONTEXT)
        assert [tokenizer.decode(row) for row in found.rows] == ["[user]cold[assistant]!", "[user]cold[assistant]"]
        with pytest.raises(ConfigError, match="expected prompts that are conversations"):
            encode_prompts(given(["plain"]), tokenizer, sampling, 0, CONTEXT)

    def test_a_turn_that_is_lost_is_left_out_with_its_row(self) -> None:
        lost = Conversation([{"role": "user", "content": "cold"}, {"role": "tool", "content": "minus four"}])
        with pytest.raises(DataError, match=r"p\.jsonl, line 2: turn 2 \(role 'tool'\)"):
            encode_prompts(given(["plain", lost]), self.made(), WHOLE, 0, CONTEXT)
        bad, rows = collected()
        assert encode_prompts(given(["plain", lost]), self.made(), WHOLE, 0, CONTEXT, bad).texts == ["plain"]
        bad.flush()
        assert "minus four" in rows[0]["why"] and rows[0]["where"] == "p.jsonl, line 2"


def test_rollouts_name_the_row_of_their_prompt(tmp_path: Path) -> None:
    """Also of two prompts with the same ids, over passes and samples; and rows follow a selection."""
    world = tiny_runs.world(tmp_path)
    config = tiny_runs.config(world, **{"sampling.samples_per_prompt": 2, "sampling.prompt_tokens": "null"})
    rows = [Prompt(text, columns={"answer": i}) for i, text in enumerate(["a film", "a film", "a story", "a cast"])]
    policy = tiny_runs.policy(world)
    stream = encode_prompts(rows, policy.tokenizer, config.sampling, 0, 128)
    source = PolicySource(policy, stream, config, torch.Generator().manual_seed(0), None)
    seen = []
    for step in (1, 2, 3, 4):
        rollouts = source.take(step)
        places = rollouts.evidence["source_row"].tolist()
        assert places == [place for place in stream.places(step, 3) for _ in range(2)]
        assert [tiny_runs.alone(rollouts, i)[0] for i in range(6)] == [stream.rows[place] for place in places]
        picked = rollouts.select(torch.tensor([5, 0]))
        assert picked.evidence["source_row"].tolist() == [places[5], places[0]]
        seen += places[::2]
    assert sorted(seen) == sorted([0, 1, 2, 3] * 3)
    assert stream.columns == [{"answer": i} for i in range(4)]
    bare = encode_prompts(given(["a film", "a story"]), policy.tokenizer, config.sampling, 0, 128)
    assert PolicySource(policy, bare, config, torch.Generator().manual_seed(0), None).take(1).evidence == {}
