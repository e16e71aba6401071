"""Single checks of `apportion doctor`: templates, heads, spare tokens, untrusted files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foreign_models
import planted
import pytest
import tiny
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from apportion.data import Labelled
from apportion.errors import ModelError
from apportion.models.pretrained import generation_stops
from apportion.models.tokenizers import with_pad
from apportion.stages.doctor import Case, Check, run_checks
from apportion.stages.doctor.checks import labels, policy, prompts, reward_tokenizer, tokens
from apportion.stages.doctor.checks.reward import looks_initialised, score_layer
from apportion.stages.doctor.findings import FAIL, OK, WARN, Result, combine, fail, ok, warn
from apportion.stages.doctor.reward import CHECKS as REWARD_CHECKS
from apportion.stages.doctor.rl import CHECKS

THINKING = (
    "{% for m in messages %}<eos>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}<eos>\n{% endfor %}{% if add_generation_prompt %}<eos>assistant\n{% endif %}"
)


def case(texts: list[Any], made: Any | None = None, **settings: Any) -> Case:
    """Return a case of these prompts, whole ones unless `settings` say otherwise."""
    made = made or tiny.tokenizer()
    chosen = SimpleNamespace(**{"prompt_tokens": None, "stop": "eos", "max_new_tokens": 5} | settings)
    rows = [made(text)["input_ids"] if isinstance(text, str) else [5, 6] for text in texts]
    config = SimpleNamespace(sampling=chosen, pad_token=None)
    embeddings = SimpleNamespace(vocab_size=400)
    named = SimpleNamespace(get_text_config=lambda: embeddings)
    return Case(config, texts=texts, rows=rows, tokenizer=made, policy_settings=named)


def templated(template: str) -> Any:
    """Return the tiny tokenizer with a chat template."""
    made = tiny.tokenizer()
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    "template", [foreign_models.BRACKETS, THINKING, planted.TURNS.replace("{END}", "") + planted.ASKS]
)
def test_templates_without_a_usual_generation_prompt_are_fine(template: str) -> None:
    """[/INST] with no generation prompt (Mistral, Llama 2); thoughts before a shown answer (Qwen 3); ChatML."""
    made = templated(template)
    turns = [[turn] for turn in planted.CHAT]
    assert prompts.generation_prompt(made, turns, prompts.rendered(made, turns, True)) == (OK, "", "")
    assert prompts.chat_template(case(turns, made))[0] == OK


def test_the_other_checks_of_a_template_always_run() -> None:
    level, message, fix = prompts.chat_template(
        case([[{"role": "user", "content": "say <eos>"}]], templated(planted.TURNS.replace("{END}", "")))
    )
    assert level == WARN and "no generation prompt" in message and "inside a message" in message
    assert "add_generation_prompt" in fix and "Remove special tokens" in fix


def test_combined_results_have_the_worst_level() -> None:
    assert combine(ok("a"), ok("")) == (OK, "a", "")
    assert combine(ok("a"), warn("b", "B."), fail("c", "C.")) == (FAIL, "a; b; c", "B. C.")


def test_a_token_that_nothing_uses_needs_no_embedding() -> None:
    """As <image_soft_token> of text-only models."""
    made = tiny.tokenizer()
    made.add_tokens(["<image>"])
    assert tokens.vocabulary(case(["a film"], made)) == (
        OK, "401 tokens with ids up to 400, 400 embeddings; 1 tokens have none, and none of them is used", "",
    )  # fmt: skip
    assert tokens.vocabulary(case(["a <image>"], made))[0] == FAIL
    made.pad_token = "<image>"
    assert tokens.vocabulary(case(["a film"], made))[0] == FAIL
    plain = tiny.tokenizer()
    fewer = case(["!"], plain)
    fewer.policy_settings = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=390))
    level, message, fix = tokens.vocabulary(fewer)  # ten words of its own: they may be met any time
    assert level == WARN and "10 tokens have none" in message and "trained with" in fix


def test_a_reward_model_with_spare_tokens_scores_ids() -> None:
    made = tiny.tokenizer()
    made.add_tokens(["<image>"])
    one = case(["a film"], made)
    one.reward_tokenizer, one.context = made, 128
    shape = SimpleNamespace(vocab_size=400, pad_token_id=0, max_position_embeddings=128)
    one.reward_settings = SimpleNamespace(get_text_config=lambda: shape)
    level, message, _ = reward_tokenizer.tokenizer(one)
    assert level == OK and "scores ids" in message
    one.policy_settings = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=401))
    level, message, _ = reward_tokenizer.tokenizer(one)  # now the policy can generate it
    assert level == FAIL and "1 ids in use have none: 400" in message


def test_a_trained_head_is_distinguished_from_a_new_one() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [0.02 * torch.randn(576, generator=generator) for _ in range(200)]
    step = 0.01 * torch.sign(torch.randn(576, generator=generator))  # a thousand steps of 1e-5, as Adam moves a weight
    assert sum(looks_initialised(one, None, 0.02) for one in drawn) >= 180
    assert sum(looks_initialised(one + step, None, 0.02) for one in drawn) <= 30
    assert not looks_initialised(drawn[0], torch.tensor([1e-4]), 0.02), "a bias that moved"
    assert looks_initialised(drawn[0], torch.zeros(1), 0.02) == looks_initialised(drawn[0], None, 0.02)
    assert not looks_initialised(0.02 * torch.sign(drawn[0]), None, 0.02), "no normal distribution"
    assert not looks_initialised(drawn[0], None, 0.0)


def test_the_last_layer_of_a_head_is_checked() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = RobertaForSequenceClassification(RobertaConfig(**sizes, vocab_size=20, num_labels=1))
    assert score_layer(model) is model.classifier.out_proj
    assert score_layer(torch.nn.Linear(2, 2)) is None


def test_texts_with_both_labels_fail_from_one_in_a_hundred() -> None:
    rows = [Labelled(f"a film {i}", i % 2) for i in range(199)]
    level, message, fix = labels.repeated(Case(None, training=[*rows, Labelled("A film 0", 1)]))
    assert level == WARN and "1 with the other label" in message and fix
    assert labels.repeated(Case(None, training=[*rows[:50], Labelled("A film 0", 1)]))[0] == FAIL


def test_the_longest_and_the_shortest_prompts_are_always_among_them() -> None:
    for count in (1, 2, 7, 8, 9, 15, 16, 17, 100):
        rows = [[0] * (1 + i) for i in range(count)]
        lengths = [len(row) for row in policy.some_prompts(Case(None, rows=rows))]
        assert lengths == sorted(set(lengths)) and len(lengths) == min(8, count)
        assert lengths[-1] == count and (lengths[0] == 1)


def test_an_unexpected_error_while_files_are_opened_fails() -> None:
    def broken(case: Case) -> Result:
        raise KeyError("rope")

    checks = [
        Check("opens", "", broken, opens=True),
        Check("other", "", broken),
        Check("loads", "", broken, loads=True),
    ]
    assert [(one.level, one.message) for one in run_checks(Case(None), checks)] == [
        (level, "KeyError: 'rope'") for level in (FAIL, WARN, FAIL)
    ]
    assert {one.name for one in CHECKS if one.opens} == {"method", "policy", "reward model", "prompts"}
    assert {one.name for one in REWARD_CHECKS if one.opens} == {"model", "labels"}


@pytest.mark.parametrize("wrong", [{"eos_token_id": [[2]]}, {"eos_token_id": "x"}, {"eos_token_id": True}])
def test_generation_settings_that_are_none_name_their_file(tmp_path: Path, wrong: dict[str, Any]) -> None:
    folder = planted.settings_of(tiny.save_policy(tmp_path / "m"), "generation_config.json", **wrong)
    with pytest.raises(ModelError, match=r"m/generation_config\.json: got"):
        generation_stops(str(folder))


def test_any_token_of_the_vocabulary_may_be_the_pad() -> None:
    assert with_pad("policy", tiny.tokenizer(pad=None), "<unk>").pad_token_id == 2
    made = tiny.tokenizer()
    made.add_special_tokens({"bos_token": "<s>"})
    with pytest.raises(ModelError, match=r"pad_token: got '<padd>'.*'<pad>', '<unk>'\]") as error:
        with_pad("policy", made, "<padd>")
    assert "<eos>" not in str(error.value) and "<s>" not in str(error.value)
