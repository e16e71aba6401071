"""The `with` block of the attention row: what it restores, refuses and ignores, and what memory it takes."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from apportion.errors import ApportionError, ModelError
from apportion.models.attention.row import attention_row


def registry() -> tuple[dict, dict]:
    """Return copies of what transformers' attention registry holds, its local overrides apart."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return dict(ALL_ATTENTION_FUNCTIONS._local_mapping), dict(ALL_ATTENTION_FUNCTIONS.items())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_registry_is_restored_on_any_exit(implementation):
    model = tiny_models.build("llama (grouped queries)", implementation=implementation)
    inputs, _ = tiny_models.batch("left")
    before = registry()
    with attention_row(model):
        assert registry() != before
        model(**inputs)
    assert registry() == before
    with pytest.raises(KeyError), attention_row(model):
        raise KeyError("inside")
    assert registry() == before
    with pytest.raises(RuntimeError), attention_row(model):
        model(input_ids=torch.full((3, 4), 0.5))
    assert registry() == before and not model._forward_pre_hooks


def test_an_override_that_was_there_comes_back():
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny_models.build("gpt2")
    inputs, _ = tiny_models.batch("none")
    plain, called = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def counting(*args, **kwargs):
        called.append(1)
        return plain(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = counting
    try:
        with attention_row(model):
            model(**inputs)
        assert len(called) == 3, "the function that was there must still do the work"
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is counting
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert isinstance(ALL_ATTENTION_FUNCTIONS, AttentionInterface) and ALL_ATTENTION_FUNCTIONS["sdpa"] is plain


def test_a_second_forward_in_a_block_is_an_error_and_a_new_block_is_not():
    model = tiny_models.build("gpt2")
    inputs, last = tiny_models.batch("left")
    before = registry()
    with attention_row(model):
        model(**inputs)
        with pytest.raises((RuntimeError, ApportionError), match="second forward"):
            model(**inputs)
    assert registry() == before
    other, _ = tiny_models.batch("left", seed=1)
    first, second = [], []
    for given, kept in ((inputs, first), (other, second), (inputs, first)):
        with attention_row(model) as seen:
            model(**given)
        kept.append(seen.weights(last))
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], second[0])


def test_another_models_forward_is_ignored():
    mine, other = tiny_models.build("gpt2", seed=0), tiny_models.build("gpt2", seed=1)
    inputs, last = tiny_models.batch("left")
    with torch.no_grad(), attention_row(mine) as alone:
        mine(**inputs)
    with torch.no_grad(), attention_row(mine) as seen:
        other(**inputs)
        with pytest.raises(ModelError):
            seen.weights(last)
        mine(**inputs)
        other(**inputs)
    assert torch.equal(alone.weights(last), seen.weights(last))


def test_two_models_may_be_tapped_at_once():
    mine, other = tiny_models.build("gpt2", seed=0), tiny_models.build("llama (grouped queries)", seed=1)
    inputs, last = tiny_models.batch("left")
    before = registry()
    with torch.no_grad(), attention_row(mine) as a, attention_row(other) as b:
        mine(**inputs)
        other(**inputs)
    assert registry() == before
    for model, nested in ((mine, a), (other, b)):
        with torch.no_grad(), attention_row(model) as alone:
            model(**inputs)
        assert torch.equal(alone.weights(last), nested.weights(last))


def test_layers_run_again_in_a_backward_pass_are_not_read():
    """Gradient checkpointing runs them from the last to the first, so that the first would be taken for the last."""
    model = tiny_models.build("llama (grouped queries)")
    inputs, last = tiny_models.batch("left")
    plain = tiny_models.build("llama (grouped queries)")
    with torch.no_grad(), attention_row(plain) as expected:
        plain(**inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with attention_row(model) as seen:
        model(**inputs, use_cache=False).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
    torch.testing.assert_close(seen.weights(last), expected.weights(last), rtol=0, atol=1e-5)


LENGTH, HEADS, HEAD_SIZE = 256, 4, 8


@pytest.mark.parametrize("name", ["gpt2", "llama (grouped queries)", "mistral (window 4)", "bert"])
@pytest.mark.parametrize("padding", ["left", "none"])
def test_no_square_matrix_is_allocated(name, padding):
    """At T=256 the tap adds nothing inside the forward, and reading a row costs about H·T, never T·T."""
    model = tiny_models.build(name)
    inputs, last = tiny_models.batch(padding, length=LENGTH)
    with torch.no_grad():
        with tiny_models.Sizes() as plain:
            model(**inputs)
        with attention_row(model) as seen, tiny_models.Sizes() as tapped:
            model(**inputs)
        with tiny_models.Sizes() as reading:
            seen.weights(last)
    assert sorted(tapped.seen) == sorted(plain.seen), "the tap allocated something during the forward"
    largest = max(reading.seen, key=lambda entry: torch.Size(entry[1]).numel())
    # gathered q, float32 keys and a row of scores, each (3,H,T) or (3,H,T,D)
    assert torch.Size(largest[1]).numel() <= 3 * HEADS * LENGTH * HEAD_SIZE, largest
    assert not any(shape.count(LENGTH) > 1 for _, shape in reading.seen)


def test_the_square_matrix_check_can_fail():
    model = tiny_models.build("gpt2", implementation="eager")
    inputs, _ = tiny_models.batch("left", length=LENGTH)
    with torch.no_grad(), tiny_models.Sizes() as sizes:
        model(**inputs, output_attentions=True)
    assert any(shape.count(LENGTH) > 1 for _, shape in sizes.seen)
