"""How a classifier reads a text is found out by running it: every family's score is the classifier's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_models
import tiny_runs
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from apportion.errors import ModelError
from apportion.evidence.reward import reward_evidence
from apportion.models.reward import RewardModel, load_reward
from apportion.models.reward.loading import ALONE
from apportion.models.reward.reading import own_pad, read_model
from apportion.stages.reward.evaluation import start_scores
from apportion.stages.reward.excerpts import TokenRows, first_tokens, flat

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
EDGES = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
MODERN = SIZES | EDGES | {"global_attn_every_n_layers": 1}
EURO = SIZES | EDGES | {"num_key_value_heads": 4}
CONV = SIZES | {"embedding_size": 32, "conv_kernel_size": 3, "head_ratio": 1}
MOBILE = SIZES | {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 1}
GEMMA = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "use_bidirectional_attention": True}
# family, settings, (causal, place, batched)
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[bool, str, bool]]] = {
    "bert": ("bert", SIZES, (False, "first", True)),
    "roberta": ("roberta", SIZES, (False, "first", True)),
    "luke": ("luke", SIZES, (False, "first", True)),
    "mpnet": ("mpnet", SIZES, (False, "first", True)),
    "i-bert": ("ibert", SIZES, (False, "first", True)),
    "nystromformer": ("nystromformer", SIZES, (False, "first", False)),
    "fnet": ("fnet", SIZES, (False, "first", False)),
    "convbert": ("convbert", CONV, (False, "first", False)),
    "mobilebert": ("mobilebert", MOBILE, (False, "first", False)),
    "modernbert, mean": ("modernbert", MODERN | {"classifier_pooling": "mean"}, (False, "pooled", True)),
    "modernbert, cls": ("modernbert", MODERN | {"classifier_pooling": "cls"}, (False, "first", True)),
    "eurobert, late": ("eurobert", EURO | {"classifier_pooling": "late"}, (False, "pooled", True)),
    "eurobert, mean": ("eurobert", EURO | {"classifier_pooling": "mean"}, (False, "pooled", True)),
    "gemma 3, bidirectional": ("gemma3_text", GEMMA, (False, "last", True)),
    "gpt-2": ("gpt2", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4}, (True, "last", True)),
    "llama": ("llama", SIZES | {"num_key_value_heads": 2}, (True, "last", True)),
}
TEXTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15], [16, 17, 18, 19, 20]]


def family(name: str, pad: int | None = 0) -> Any:
    """Return a random classifier with one label, its weights far from flat."""
    kind, settings, _ = FAMILIES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{"max_position_embeddings": 64, "num_labels": 1} | settings, pad_token_id=pad)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def padded(texts: Sequence[Sequence[int]], *, left: bool = False, fill: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, texts)) + 1
    rows = [[fill] * (width - len(t)) + [*t] if left else [*t] + [fill] * (width - len(t)) for t in texts]
    mask = torch.arange(width) < torch.tensor([[len(t)] for t in texts])
    return torch.tensor(rows), mask.flip(1) if left else mask


@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_scores_as_each_text_alone(name: str) -> None:
    model = family(name)
    reward = RewardModel(model, None)
    causal, place, batched = FAMILIES[name][2]
    assert (reward.reading.causal, reward.reading.place) == (causal, place)
    assert reward.reading.batched == batched
    expected = torch.tensor([tiny_models.own_score(model, ids) for ids in TEXTS])
    assert expected.std() > 0.01, "the texts' scores hardly differ"
    for left in (False, True) if causal else (False,):
        scores, _, positions = reward.score(*padded(TEXTS, left=left))
        torch.testing.assert_close(scores, expected, rtol=0, atol=2e-5 * float(expected.abs().max().clamp_min(1)))
        reward.check_positions(positions, padded(TEXTS, left=left)[1])


def test_trying_a_model_leaves_it_and_the_random_state_as_they_were() -> None:
    model, state = family("llama"), torch.get_rng_state()
    model.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forwards = []
    model.register_forward_pre_hook(
        lambda m, args, given: forwards.append(given["input_ids"].numel()), with_kwargs=True
    )
    read_model(model)
    assert torch.equal(torch.get_rng_state(), state) and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert len(forwards) == 2 and sum(forwards) <= 60, "it has to be cheap on a large model"
    assert all(p.grad is None for p in model.parameters()) and model.config.pad_token_id == 0


def test_heads_of_zeros_or_opposites_do_not_hide_the_position() -> None:
    for weights in ([0.0, 0.0], [1.0, -1.0]):
        model = tiny_models.build("llama (grouped queries)", labels=2)
        with torch.no_grad():
            model.score.weight.copy_(torch.tensor(weights)[:, None] * model.score.weight[:1])
        assert read_model(model)[:3] == (True, "last", True)


def test_rounding_of_a_score_near_zero_is_not_taken_for_padding() -> None:
    """A head at a right angle to the state of the text that is tried: its logit is all rounding."""
    model = tiny_models.build("llama (grouped queries)")
    states: list[torch.Tensor] = []
    hook = model.model.register_forward_hook(lambda m, args, out: states.append(out.last_hidden_state.detach()))
    read_model(model)
    hook.remove()
    state = states[0][0, -1]
    with torch.no_grad():
        model.score.weight -= (model.score.weight @ state) / (state @ state) * state
        assert abs(float(model.score(state))) < 1e-5 * float(model.score.weight.norm() * state.norm())
    assert read_model(model).batched


def test_a_model_that_cannot_score_a_text_is_one_error() -> None:
    model = family("bert")
    model.forward = lambda input_ids, pixel_values: None
    with pytest.raises(ModelError, match="BertForSequenceClassification, which cannot score 8"):
        read_model(model)


@pytest.mark.parametrize("name", ["modernbert, mean", "eurobert, late"])
def test_attention_of_a_pooled_score_is_refused_by_name(name: str) -> None:
    reward, batch = RewardModel(family(name), None), tiny_runs.rollouts_of([[5, 6]], [[7, 8, 9]])
    found = reward_evidence(reward, batch, frozenset({"scores", "prefix_scores"}))
    assert float(found["scores"]) == pytest.approx(tiny_models.own_score(reward.model, [5, 6, 7, 8, 9]), abs=1e-5)
    for t in range(3):
        expected = tiny_models.own_score(reward.model, [5, 6, 7, 8, 9][: 3 + t])
        assert float(found["prefix_scores"][0, t]) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ModelError, match=r"reward_attention: got '\w+, whose score is pooled .*prefix_difference"):
        reward_evidence(reward, batch, frozenset({"scores", "reward_attention"}))


# a decoder's pad id: one that also ends texts (3), none, or none of its own embeddings
PADS = {"EOS": 3, "none": None, "minus one": -1}
ENDING = [[5, 6, 7, 3], [8, 3], [3, 9, 10, 11, 12], [13, 14, 3, 3]]


@pytest.mark.parametrize("name", ["llama", "gpt-2"])
@pytest.mark.parametrize("pad", PADS)
def test_masks_tell_padding_whatever_the_pad_id_is(name: str, pad: str) -> None:
    """Scores, attention and prefixes are those of each text alone; ids equal to the pad id at its end are skipped."""
    model = family(name, PADS[pad])
    model.config.eos_token_id = 3
    reward, before = RewardModel(model, None), model.config.pad_token_id
    expected = [tiny_models.own_score(model, ids) for ids in ENDING]
    for left in (False, True):
        scores, rows, positions = reward.score(*padded(ENDING, left=left, fill=50), attention=True)
        assert scores.tolist() == pytest.approx(expected, abs=1e-5)
        mask = padded(ENDING, left=left)[1]
        reward.check_positions(positions, mask)
        for row, ids in enumerate(ENDING):
            one = torch.tensor([ids])
            _, alone, at = reward.score(one, torch.ones_like(one, dtype=torch.bool), attention=True)
            read = max(i for i, token in enumerate(ids) if token != 3) if pad == "EOS" else len(ids) - 1
            assert int(at) == read and int(positions[row]) == int(mask[row].nonzero()[read])
            torch.testing.assert_close(rows[row][mask[row]], alone[0], rtol=0, atol=1e-5)
    batch = tiny_runs.rollouts_of([[20, 21], [22]], [[5, 3], [6, 7, 3]])
    found = reward_evidence(reward, batch, frozenset({"scores", "prefix_scores", "prompt_score", "reward_attention"}))
    for row in range(2):
        prompt, response = tiny_runs.alone(batch, row)
        for t in range(len(response)):
            score = tiny_models.own_score(model, prompt + response[: t + 1])
            assert float(found["prefix_scores"][row, t]) == pytest.approx(score, abs=1e-5)
        assert float(found["prompt_score"][row]) == pytest.approx(tiny_models.own_score(model, prompt), abs=1e-5)
    assert model.config.pad_token_id == before and (own_pad(model) is None) == (pad != "EOS")


@pytest.mark.parametrize("pad", PADS)
def test_shared_prompts_score_as_rows_of_their_own(pad: str) -> None:
    """Also where a response is EOS alone, which is also the pad: its score is read in its prompt."""
    model = family("llama", PADS[pad])
    model.config.eos_token_id = 3
    reward = RewardModel(model, None)
    for last in ([30, 3], [3]):
        batch = tiny_runs.rollouts_of([[5, 6, 7, 8, 9, 10]] * 4, [[31, 32, 3], [33, 3], [34, 35, 36], last])
        grouped = type(batch)(**{**vars(batch), "group": torch.zeros(4, dtype=torch.int64)})
        found = reward_evidence(reward, grouped, frozenset({"scores"}))["scores"]
        rows = [[i for part in tiny_runs.alone(batch, row) for i in part] for row in range(4)]
        assert found.tolist() == pytest.approx([tiny_models.own_score(model, ids) for ids in rows], abs=1e-5)


@pytest.mark.parametrize("pad", ["<eos>", None])
def test_a_tokenizer_that_pads_with_eos_or_not_at_all_is_no_obstacle(tmp_path: Path, pad: str | None) -> None:
    folder = tiny.save_reward(tmp_path, labels=1)
    plain = load_reward(str(folder), device="cpu").score(*padded(TEXTS))[0]
    tiny.tokenizer(pad=pad).save_pretrained(folder)
    assert torch.equal(load_reward(str(folder), device="cpu").score(*padded(TEXTS))[0], plain)


@pytest.mark.parametrize(("name", "alone"), [("convbert", True), ("bert", False)])
def test_reading_one_row_at_a_time_is_said(name: str, alone: bool, tmp_path: Path) -> None:
    family(name).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert (ALONE in load_reward(str(tmp_path), device="cpu").notes) is alone


@pytest.mark.parametrize(("name", "behind", "forwards"), [("gpt2", [], 1), ("gpt2", [1], 3), ("bert", [], 3)])
def test_starts_of_texts_are_scored_as_texts_of_their_own(name: str, behind: list[int], forwards: int) -> None:
    """A decoder scores them on the way, unless special tokens stand behind each."""
    reward = RewardModel(tiny_models.build(name), None)
    texts = TokenRows([[*range(20, 20 + n)] for n in (3, 9, 14)], [0, 1, 1], [0, 2, 0], [([2], behind)] * 3, False)
    starts = {length: flat(first_tokens(texts, 3, length)) for length in (2, 5, 10)}
    seen: list[int] = []
    handle = reward.model.base_model.register_forward_hook(lambda *args: seen.append(1))
    assert reward.reading  # reads the model before forwards are counted
    seen.clear()
    found = start_scores(reward, starts)
    handle.remove()
    assert len(seen) == forwards
    for length, cut in starts.items():
        expected = [tiny_models.own_score(reward.model, one.ids) for one in cut]
        assert found[length].tolist() == pytest.approx(expected, abs=1e-4)
