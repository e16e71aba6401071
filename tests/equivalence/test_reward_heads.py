"""The stored head decides: how many scores there are, which label is the good one, and what is no reward model."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from apportion.errors import ConfigError, ModelError
from apportion.models.reward import load_reward
from apportion.models.stored_head import positive_label, stored_rows

IDS = torch.tensor([[50, 60, 70, 80, 90]])
ALL = torch.ones_like(IDS, dtype=torch.bool)


def edit(folder: Path, **changes: object) -> None:
    """Change settings in a folder's config.json; None takes one away."""
    file = folder / "config.json"
    stored = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in stored.items() if value is not None}))


def score(folder: Path, **settings: object) -> float:
    return float(load_reward(str(folder), device="cpu", **settings).score(IDS, ALL)[0])


@torch.no_grad()
def logits(model: torch.nn.Module) -> list[float]:
    return model.eval()(input_ids=IDS).logits[0].tolist()


@pytest.mark.parametrize("shard", ["10GB", "40KB"])
def test_a_head_of_one_row_is_read_where_the_settings_say_nothing_of_labels(tmp_path: Path, shard: str) -> None:
    """transformers then assumes two; the rows are in the header of the file, or of the shard that has the head."""
    model = AutoModelForSequenceClassification.from_config(tiny.config(1, num_labels=1))
    (expected,) = logits(model)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "40KB")
    edit(tmp_path, num_labels=None, id2label=None, label2id=None)
    assert stored_rows(str(tmp_path)) == 1 and score(tmp_path) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("labels", [1, 2])
def test_an_adapters_own_head_counts(tmp_path: Path, labels: int) -> None:
    """As TRL writes it: the base is a language model, and the adapter keeps `score` as a module to save."""
    tiny.save_policy(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=labels)
    settings = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj"], modules_to_save=["score"])
    adapted = get_peft_model(base, settings)
    with torch.no_grad():
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter += 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    found = logits(adapted)
    assert score(tmp_path / "adapter") == pytest.approx(found[-1] - (found[0] if labels == 2 else 0.0), abs=1e-5)


@pytest.mark.parametrize(("before", "labels"), [(3, 1), (1, 2)])
def test_an_adapters_own_head_takes_the_place_of_one_of_another_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, before: int, labels: int
) -> None:
    """The base is a classifier of other labels; nothing is printed of the head that is not used."""
    tiny.save_reward(tmp_path / "base", labels=before)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=labels, ignore_mismatched_sizes=True
    )
    settings = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj"], modules_to_save=["score"])
    adapted = get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    found = logits(adapted)
    logging.getLogger("transformers").propagate = True
    caplog.clear()
    assert score(tmp_path / "adapter") == pytest.approx(found[-1] - (found[0] if labels == 2 else 0.0), abs=1e-5)
    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_head_of_three_rows_is_refused_whatever_the_settings_say(tmp_path: Path) -> None:
    tiny.save_reward(tmp_path, labels=3)
    edit(tmp_path, id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1})
    with pytest.raises(ModelError, match=r"with 3 labels'; expected 1 or 2 labels"):
        score(tmp_path)


def test_classifiers_of_tokens_and_of_several_labels_are_refused_by_name(tmp_path: Path) -> None:
    AutoModelForTokenClassification.from_config(tiny.config(1, num_labels=2)).save_pretrained(tmp_path / "tokens")
    tiny.tokenizer().save_pretrained(tmp_path / "tokens")
    with pytest.raises(ModelError, match=r"a classifier of tokens'; expected a sequence classifier"):
        score(tmp_path / "tokens")
    edit(tiny.save_reward(tmp_path / "many"), problem_type="multi_label_classification")
    with pytest.raises(ModelError, match="a multi-label classifier"):
        score(tmp_path / "many")
    edit(tiny.save_reward(tmp_path / "one", labels=1), problem_type="multi_label_classification")
    assert score(tmp_path / "one") == pytest.approx(score(tiny.save_reward(tmp_path / "same", labels=1)))


@pytest.mark.parametrize(("labels", "good"), [
    (("NEGATIVE", "POSITIVE"), 1), (("positive", "negative"), 0), (("bad", "good"), 1), (("chosen", "rejected"), 0),
    (("unacceptable", "acceptable"), 1), (("not helpful", "Helpful answer"), 1), (("LABEL_0", "LABEL_1"), 1),
    (("1", "0"), 0), (("label_1", "label_0"), 0),
])  # fmt: skip
def test_names_say_which_label_is_good(labels: tuple[str, str], good: int) -> None:
    index, note = positive_label("reward_model", dict(enumerate(labels)), 2)
    assert index == good and (note is not None) == ("1" in labels[good])


@pytest.mark.parametrize("labels", [("toxic", "clean"), ("A", "B"), ("negative", "neutral"), ("good", "better"),
                                    ("not good", "not helpful"), ("LABEL_1", "LABEL_2")])  # fmt: skip
def test_names_that_do_not_say_it_are_asked_about(labels: tuple[str, str]) -> None:
    names = dict(enumerate(labels))
    with pytest.raises(
        ModelError, match=rf"labels: got .'{labels[0]}' and '{labels[1]}'.*--positive_label {labels[1]}"
    ):
        positive_label("reward_model", names, 2)
    for i, label in enumerate(labels):
        assert positive_label("reward_model", names, 2, label.upper()) == (i, None)
        assert positive_label("reward_model", names, 2, str(i)) == (i, None)
    with pytest.raises(ConfigError, match=rf"positive_label: got 'none'; expected one of {labels[0]}, {labels[1]}"):
        positive_label("reward_model", names, 2, "none")


def test_one_label_leaves_nothing_to_choose() -> None:
    assert positive_label("reward_model", {0: "A"}, 1) == (1, None)
    with pytest.raises(ConfigError, match="positive_label: got 'A'; expected null"):
        positive_label("reward_model", {0: "A"}, 1, "A")


def test_the_setting_turns_the_score(tmp_path: Path) -> None:
    folder = tiny.save_reward(tmp_path)
    edit(folder, id2label={0: "clean", 1: "toxic"}, label2id={"clean": 0, "toxic": 1})
    with pytest.raises(ModelError, match=r"'clean' and 'toxic'.; expected names that say which is good"):
        score(folder)
    zero, one = logits(AutoModelForSequenceClassification.from_pretrained(folder))
    assert score(folder, positive="clean") == pytest.approx(zero - one, abs=1e-5)
    assert score(folder, positive="1") == pytest.approx(one - zero, abs=1e-5)
