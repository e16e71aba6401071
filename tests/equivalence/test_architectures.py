"""The attention row on every architecture and kernel against the model's own eager attention, and the refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_runs
import torch
from zoo import CONFIGS, ENCODERS, KERNELS, PADDINGS, REFUSED, build, eager, inputs_of, on, tap

from apportion.errors import ModelError
from apportion.models.attention.row import attention_row


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_equal_the_models_own_eager_attention(name: str, implementation: str, padding: str) -> None:
    model = on(name, implementation)
    inputs, pooled = inputs_of(name, padding)
    matrices = eager(name, inputs)
    depth, _, heads = matrices.shape[:3]
    seen = tap(model, inputs, "all")
    got = seen.weights(pooled)
    assert got.shape == (3, heads, 12) and got.dtype == torch.float32 and not got.requires_grad
    torch.testing.assert_close(got, matrices[-1][torch.arange(3), :, pooled], rtol=0, atol=1e-5)
    assert got.amax() > 0.2, "the weights are too flat to tell anything"
    pads = inputs["attention_mask"] == 0
    assert (got.transpose(1, 2)[pads] == 0).all(), "a pad has attention"
    total = got.sum(dim=-1)
    if "sinks" in name:
        assert (total < 0.99).any() and (total > 0).all()
    else:
        torch.testing.assert_close(total, torch.ones(3, heads))
    # several positions (B,R), here every real one, and every layer of the same forward
    every = torch.arange(12).expand(3, -1)
    rows = seen.weights(every)
    assert rows.shape == (3, 12, heads, 12)
    torch.testing.assert_close(rows[~pads], matrices[-1].transpose(1, 2)[~pads], rtol=0, atol=1e-5)
    stacked = seen.layer_weights(every)
    assert stacked.shape == (3, 12, depth, heads, 12)
    torch.testing.assert_close(stacked[~pads], matrices.permute(1, 3, 0, 2, 4)[~pads], rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_of_the_batch_equals_the_row_alone(name: str, implementation: str) -> None:
    model = on(name, implementation)
    inputs, pooled = inputs_of(name, "both")
    in_batch = tap(model, inputs).weights(pooled)
    for i in range(3):
        real = inputs["attention_mask"][i].bool()
        alone = {k: v[i : i + 1, real] for k, v in inputs.items()}
        at = pooled[i : i + 1] - int(real.int().argmax())
        row = tap(model, alone).weights(at)
        torch.testing.assert_close(in_batch[i : i + 1, :, real], row, rtol=0, atol=1e-5)
        del alone["attention_mask"]
        torch.testing.assert_close(tap(model, alone).weights(at), row, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in CONFIGS if "window" in n])
def test_the_last_layer_of_the_windowed_ones_is_windowed(name: str) -> None:
    inputs, pooled = inputs_of(name, "none")
    row = tap(build(name), inputs).weights(pooled)
    assert (row[:, :, :8] == 0).all() and (row[:, :, 8:] > 0).all()


@pytest.mark.parametrize("name", [n for n in CONFIGS if "full" in n or n == "llama (grouped queries)"])
def test_the_last_layer_of_the_others_is_not(name: str) -> None:
    inputs, pooled = inputs_of(name, "none")
    assert (tap(build(name), inputs).weights(pooled) > 0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_encoders_see_both_sides_and_decoders_one(name: str) -> None:
    inputs, _ = inputs_of(name, "none")
    seen = tap(build(name), inputs)
    ahead = seen.weights(torch.tensor([5, 5, 5]))[:, :, 6:]
    assert (ahead > 0).all() if name in ENCODERS else (ahead == 0).all()
    assert seen.causal == (name not in ENCODERS)


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama (grouped queries)", "gemma2 (soft-cap, window)", "bert"])
def test_compiled_flex_attention(name: str) -> None:
    """As a run would use it: flex attention's kernel compiled for this device."""
    inputs, pooled = inputs_of(name, "left")
    model = build(name, "flex_attention")
    with torch.no_grad(), attention_row(model) as seen:
        model(**inputs)
    expected = eager(name, inputs)[-1][torch.arange(3), :, pooled]
    torch.testing.assert_close(seen.weights(pooled), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name_with_the_fix(name: str) -> None:
    model = build(name)
    inputs, last = inputs_of(name, "left")
    with torch.no_grad(), attention_row(model) as seen:
        model(**inputs)
    with pytest.raises(ModelError, match=rf"{type(model).__name__}.*0 attention layers.*3 layers.*uniform, sparse"):
        seen.weights(last)


@pytest.mark.parametrize("name", REFUSED)
def test_one_without_sdpa_is_loaded_with_eager_attention_and_scores(name: str, tmp_path: Path) -> None:
    model = build(name, vocab_size=len(tiny_runs.tiny.tokenizer()), pad_token_id=tiny_runs.PAD)
    model.save_pretrained(tmp_path / "judge")
    tiny_runs.tiny.tokenizer().save_pretrained(tmp_path / "judge")
    judge = tiny_runs.judge(tmp_path, "judge")
    assert judge.model.config._attn_implementation == "eager"
    ids = torch.arange(4, 16).reshape(2, 6)
    expected = model(input_ids=ids).logits
    scores, _, _ = judge.score(ids, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(scores, expected[:, 1] - expected[:, 0], rtol=0, atol=1e-5)


def test_an_encoder_with_a_decoder_is_refused_before_it_runs() -> None:
    """The last attention that it calls is the decoder's look at the encoder: no attention over the text."""
    from transformers import BartConfig, BartForSequenceClassification

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    model = BartForSequenceClassification(BartConfig(vocab_size=99, **sizes))
    with pytest.raises(ModelError, match=r"BartForSequenceClassification.*encoder with a decoder.*uniform, sparse"):
        attention_row(model)


def test_a_model_with_other_layers_among_its_attention_is_refused() -> None:
    """GPT-2's upcast attention goes around the registry, here in one layer of three."""
    model = build("gpt2")
    model.transformer.h[1].attn.reorder_and_upcast_attn = True
    inputs, last = inputs_of("gpt2", "left")
    with pytest.raises(ModelError, match=r"GPT2ForSequenceClassification.*2 attention layers.*each of its 3 layers"):
        tap(model, inputs).weights(last)


@pytest.mark.parametrize("name", ["llama (grouped queries)", "bert", "bloom (alibi)"])
def test_an_attention_function_that_does_more_is_refused_not_approximated(name: str, monkeypatch) -> None:
    """A layer that adds a bias of its own: what q, k and the mask say is not what it did."""
    import transformers

    inputs, pooled = inputs_of(name, "left")
    if name.startswith("bloom"):
        model = build(name)
        plain = torch.nn.functional.softmax
        slope = torch.arange(12.0)
        module = transformers.models.bloom.modeling_bloom
        monkeypatch.setattr(module.F, "softmax", lambda x, **kwargs: plain(x + slope, **kwargs))
    else:
        sdpa = transformers.AttentionInterface._global_mapping["sdpa"]

        def biased(module, query, key, value, mask, **kwargs):
            return sdpa(module, query, key * torch.linspace(1, 2, key.shape[2])[:, None], value, mask, **kwargs)

        transformers.AttentionInterface.register("biased", biased)
        transformers.AttentionMaskInterface.register("biased", transformers.masking_utils.sdpa_mask)
        model = build(name, "biased")
    with torch.no_grad(), attention_row(model) as seen:
        model(**inputs)
    with pytest.raises(ModelError, match=rf"{type(model).__name__}.*own output.*uniform, sparse"):
        seen.weights(pooled)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_registry_and_the_hooks_are_restored_on_any_exit(name: str) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = build(name)
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping), dict(ALL_ATTENTION_FUNCTIONS.items())

    def clean() -> bool:
        hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks, *m._forward_hooks)]
        return not hooks and before == (
            dict(ALL_ATTENTION_FUNCTIONS._local_mapping),
            dict(ALL_ATTENTION_FUNCTIONS.items()),
        )

    inputs, _ = inputs_of(name, "left")
    for failing in (False, True):
        try:
            with torch.no_grad(), attention_row(model, "all"):
                assert not clean()
                model(**(inputs if not failing else {"input_ids": torch.full((3, 4), 0.5)}))
        except (RuntimeError, TypeError):
            assert failing
        assert clean()
