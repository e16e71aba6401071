"""The attention row against eager attention, head by head: architectures, paddings, types, batches and blocks."""

from __future__ import annotations

import copy
import sys

import pytest
import tiny_models
import torch

from apportion.errors import ModelError
from apportion.models.attention.row import attention_row

PLAIN = ["gpt2", "llama (grouped queries)", "mistral (window 4)", "qwen3 (q/k norm)", "gpt-neox", "opt", "bert"]
CAPPED_OR_SINKS = ["gemma2 (soft-cap, window 4)", "gpt-oss (sinks)"]
PADDINGS = ["none", "left", "right", "both"]


def tap(model, inputs):
    with torch.no_grad(), attention_row(model) as seen:
        model(**inputs)
    return seen


def eager(model, name, inputs, labels=1):
    """Return the last layer's matrix (B,H,T,T) of an eager copy."""
    with torch.no_grad():
        return tiny_models.eager_copy(model, name, labels)(**inputs, output_attentions=True).attentions[-1]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PLAIN)
def test_equals_eager_attention(name, implementation, padding):
    model = tiny_models.build(name, implementation=implementation)
    inputs, last = tiny_models.batch(padding)
    inputs = tiny_models.positions(inputs)
    seen, expected = tap(model, inputs), eager(model, name, inputs)
    got = seen.weights(last)
    assert got.shape == (3, 4, 12) and got.dtype == torch.float32 and not got.requires_grad
    torch.testing.assert_close(got, expected[torch.arange(3), :, last], rtol=0, atol=1e-5)
    pads = inputs["attention_mask"] == 0
    assert (got.transpose(1, 2)[pads] == 0).all(), "a pad has attention"
    torch.testing.assert_close(got.sum(dim=-1), torch.ones(3, 4))
    assert got.max() > 0.3, "the weights are too small to tell anything"
    # several rows at once, here every real position; the first call again gives the same
    every = torch.arange(12).expand(3, -1)
    rows = seen.weights(every)
    assert rows.shape == (3, 12, 4, 12)
    torch.testing.assert_close(rows[~pads], expected.transpose(1, 2)[~pads], rtol=0, atol=1e-5)
    assert torch.equal(seen.weights(last), got)


@pytest.mark.parametrize("name", CAPPED_OR_SINKS)
def test_soft_capped_scores_and_sink_logits_are_matched(name):
    """Models whose softmax is not a plain one; they have no sdpa, so the registry is read for "eager" too."""
    model = tiny_models.build(name, implementation="eager")
    inputs, last = tiny_models.batch("left")
    inputs = tiny_models.positions(inputs)
    got = tap(model, inputs).weights(last)
    torch.testing.assert_close(got, eager(model, name, inputs)[torch.arange(3), :, last], rtol=0, atol=1e-5)


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_number_of_labels_does_not_matter(name, labels):
    model = tiny_models.build(name, labels=labels)
    inputs, last = tiny_models.batch("right")
    expected = eager(model, name, inputs, labels)[torch.arange(3), :, last]
    torch.testing.assert_close(tap(model, inputs).weights(last), expected, rtol=0, atol=1e-5)


def test_bert_pools_its_first_token_and_sees_both_sides():
    model = tiny_models.build("bert")
    inputs, _ = tiny_models.batch("right")
    seen, expected = tap(model, inputs), eager(model, "bert", inputs)
    first = seen.weights(torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(first, expected[:, :, 0], rtol=0, atol=1e-5)
    assert not seen.causal and (first[:, :, 5] > 0).all()
    assert tap(tiny_models.build("gpt2"), inputs).causal


@pytest.mark.parametrize("name", PLAIN)
def test_rows_one_by_one_and_without_padding_equal_the_batch(name):
    model = tiny_models.build(name)
    inputs, last = tiny_models.batch("right" if name == "bert" else "both")
    inputs = tiny_models.positions(inputs)
    in_batch = tap(model, inputs).weights(last)
    for i in range(3):
        real = inputs["attention_mask"][i].bool()
        alone = {k: v[i : i + 1, real] for k, v in inputs.items()}
        row = tap(model, alone).weights(torch.tensor([int(real.sum()) - 1]))
        torch.testing.assert_close(in_batch[i : i + 1, :, real], row, rtol=0, atol=1e-5)
        del alone["attention_mask"]  # no mask at all: causality is rebuilt
        bare = tap(model, alone).weights(torch.tensor([int(real.sum()) - 1]))
        torch.testing.assert_close(bare, row, rtol=0, atol=1e-5)


def test_no_row_before_the_last_sees_what_comes_later():
    for mask in (None, torch.ones(3, 12, dtype=torch.int64)):
        inputs, _ = tiny_models.batch("none")
        inputs = inputs | {"attention_mask": mask}
        rows = tap(tiny_models.build("gpt2"), inputs).weights(torch.arange(12).expand(3, -1))
        later = torch.ones(12, 12).triu(1).bool()
        assert (rows.transpose(1, 2)[:, :, later] == 0).all()


def test_the_sliding_window_hides_what_is_behind_it():
    inputs, last = tiny_models.batch("none")
    row = tap(tiny_models.build("mistral (window 4)"), inputs).weights(last)
    assert (row[:, :, :8] == 0).all() and (row[:, :, 8:] > 0).all()


def kernel(module, query, key, value, attention_mask, *, scaling, sliding_window=None, **_):
    """Attention as fused kernels take it: causal on its own, with a (B,T) padding mask or none, and the window."""
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    position = torch.arange(query.shape[2])
    behind = position[:, None] - position
    visible = (behind >= 0) & (behind < (sliding_window or len(position)))
    visible = visible if attention_mask is None else visible & attention_mask.bool()[:, None, None, :]
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, torch.finfo(query.dtype).min)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2), None


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", ["llama (grouped queries)", "mistral (window 4)"])
def test_kernels_that_get_a_padding_mask_or_none(name, padding):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register("test_kernel", kernel)
    AttentionMaskInterface.register("test_kernel", flash_attention_mask)
    model = tiny_models.build(name, implementation="test_kernel")
    inputs, last = tiny_models.batch(padding)
    inputs = tiny_models.positions(inputs)
    seen = tap(model, inputs)
    assert seen._calls[2].mask is None or seen._calls[2].mask.dim() == 2, "this kernel was to get no (T,T) mask"
    expected = eager(model, name, inputs)[torch.arange(3), :, last]
    torch.testing.assert_close(seen.weights(last), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama (grouped queries)", "bert"])
def test_a_bfloat16_model_stays_close(name, record_property):
    model = tiny_models.build(name)
    with torch.no_grad():  # milder weights: where scores reach tens, bfloat16 has no decimals left
        for parameter in model.parameters():
            parameter.mul_(0.6 if parameter.dim() > 1 else 1.0)
    inputs, last = tiny_models.batch("right")
    full, small = tap(model, inputs).weights(last), copy.deepcopy(model).to(torch.bfloat16)
    half = tap(small, inputs).weights(last)
    difference = float((half - full).abs().max())
    record_property("bfloat16 difference", difference)
    assert half.dtype == torch.float32 and difference <= 0.03
    torch.testing.assert_close(half.sum(dim=-1), torch.ones(3, 4))
    with torch.no_grad():  # and nearer still to what the same bfloat16 model computes itself
        eager_half = tiny_models.eager_copy(model, name).to(torch.bfloat16)(**inputs, output_attentions=True)
    own = eager_half.attentions[-1][torch.arange(3), :, last].float()
    torch.testing.assert_close(half, own, rtol=0, atol=0.02)


def test_chunks_do_not_change_the_rows(monkeypatch):
    model = tiny_models.build("llama (grouped queries)")
    inputs, _ = tiny_models.batch("left")
    seen, rows = tap(model, inputs), torch.arange(12).expand(3, -1)
    whole = seen.weights(rows)
    for elements in (1, 3 * 4 * 12 * 5):
        monkeypatch.setattr(sys.modules[attention_row.__module__], "CHUNK_ELEMENTS", elements)
        torch.testing.assert_close(seen.weights(rows), whole, rtol=0, atol=1e-6)


def test_the_tap_reads_inside_the_block_and_changes_no_output():
    model = tiny_models.build("gpt2")
    inputs, last = tiny_models.batch("left")
    with torch.no_grad():
        plain = model(**inputs).logits
        with attention_row(model) as seen:
            tapped = model(**inputs).logits
            inside = seen.weights(last)
    assert torch.equal(plain, tapped) and torch.equal(inside, seen.weights(last))


def test_gradients_flow_through_the_model_as_without_the_tap():
    model = tiny_models.build("gpt2")
    inputs, last = tiny_models.batch("left")
    gradients = []
    for tapped in (False, True):
        model.zero_grad()
        if tapped:
            with attention_row(model) as seen:
                model(**inputs).logits.sum().backward()
            assert not seen.weights(last).requires_grad
        else:
            model(**inputs).logits.sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_before_a_forward_there_is_nothing_to_read():
    model = tiny_models.build("gpt2")
    with attention_row(model) as seen, pytest.raises(ModelError, match="no forward"):
        seen.weights(torch.tensor([0]))
