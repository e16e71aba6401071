"""Other layers, heads and the rollout: against matrices written out, in one forward, as a credit; their cost."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import helpers
import pytest
import tiny_models
import tiny_runs
import torch
import zoo
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification

from apportion import credit
from apportion.config import ScoreConfig
from apportion.credit import AttentionSpec, attention_spec, requested_attention
from apportion.errors import ConfigError, DataError, ModelError
from apportion.evidence.reward import reward_evidence
from apportion.evidence.scoring import score
from apportion.models.attention.row import attention_row, needed_layers
from apportion.registry import EvidenceKey
from apportion.stages.explain import apportion_text, text_methods

SETTINGS = [
    {"layers": 0},
    {"layers": [0, -1]},
    {"layers": "all"},
    {"heads": "max"},
    {"layers": [-2, 0, 1], "heads": "max"},
    {"rollout": True},
]


def rolled(matrices: Tensor, rows: Tensor) -> Tensor:
    """Return the rollout (B,K) at `rows` (B,) from all matrices (L,B,H,T,T): the whole product, then its row."""
    identity = torch.eye(matrices.shape[-1])
    product = identity.expand(matrices.shape[1], -1, -1)
    for layer in matrices:
        product = 0.5 * (layer.mean(dim=1) + identity) @ product
    return product[torch.arange(len(rows)), rows]


def by_hand(matrices: Tensor, rows: Tensor, settings: dict) -> Tensor:
    """Return what `settings` describe (B,K) from all matrices."""
    if settings.get("rollout"):
        return rolled(matrices, rows)
    layers = settings.get("layers", -1)
    numbers = range(len(matrices)) if layers == "all" else [layers] if isinstance(layers, int) else layers
    chosen = sorted({number % len(matrices) for number in numbers})  # named twice, from both ends, a layer counts once
    heads = torch.stack([matrices[layer][torch.arange(len(rows)), :, rows] for layer in chosen])
    return (heads.amax(dim=2) if settings.get("heads") == "max" else heads.mean(dim=2)).mean(dim=0)


def test_a_rollout_by_hand() -> None:
    """Two layers, two tokens, one head: ½(A₂+I)·½(A₁+I) written out."""
    first, second = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[1.0, 0.0], [0.8, 0.2]])
    matrices = torch.stack([first, second])[:, None, None]
    # row 1: (0.4, 0.6) times ((1, 0), (0.25, 0.75))
    torch.testing.assert_close(rolled(matrices, torch.tensor([1])), torch.tensor([[0.55, 0.45]]))


@pytest.mark.parametrize("padding", ["left", "both"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_readings_equal_the_matrices_written_out(name: str, settings: dict, padding: str) -> None:
    inputs, pooled = zoo.inputs_of(name, padding)
    matrices = zoo.eager(name, inputs)
    one = attention_spec(**settings)
    got = zoo.tap(zoo.build(name), inputs, needed_layers([one])).attention(one, pooled)
    torch.testing.assert_close(got, by_hand(matrices, pooled, settings), rtol=0, atol=1e-5)
    assert (got[inputs["attention_mask"] == 0] == 0).all()
    if settings.get("rollout") and "sinks" not in name:
        torch.testing.assert_close(got.sum(dim=1), torch.ones(3))


@pytest.mark.parametrize("name", ["gpt2", "mistral (window)", "bert", "bloom (alibi)"])
def test_a_rollout_needs_no_square_matrix_and_chunks_do_not_change_it(name: str, monkeypatch) -> None:
    length = 64
    inputs, pooled = zoo.inputs_of(name, "left", length=length)
    seen = zoo.tap(zoo.build(name, length=length), inputs, "all")
    whole = seen.rollout(pooled)
    torch.testing.assert_close(whole, rolled(zoo.eager(name, inputs, length=length), pooled), rtol=0, atol=1e-5)
    monkeypatch.setattr(sys.modules[attention_row.__module__], "CHUNK_ELEMENTS", 3 * 4 * length * 5)
    with tiny_models.Sizes() as sizes:
        parts = seen.rollout(pooled)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    assert not any(shape.count(length) > 1 for _, shape in sizes.seen)


def test_a_rollout_of_a_row_alone_equals_the_batchs() -> None:
    model = zoo.build("llama (grouped queries)")
    inputs, pooled = zoo.inputs_of("llama", "both")
    in_batch = zoo.tap(model, inputs, "all").rollout(pooled)
    for i in range(3):
        real = inputs["attention_mask"][i].bool()
        alone = zoo.tap(model, {k: v[i : i + 1, real] for k, v in inputs.items()}, "all")
        row = alone.rollout(torch.tensor([int(real.sum()) - 1]))
        torch.testing.assert_close(in_batch[i : i + 1, real], row, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_a_row_costs_heads_times_length_times_head_size(name: str) -> None:
    """Counted, not timed: operations and memory grow with T, not with T², and no (T,T) tensor is made."""
    flops, elements, lengths = [], [], (128, 256, 512)
    for length in lengths:
        inputs, pooled = zoo.inputs_of(name, "left", length=length)
        model = zoo.build(name, length=length)
        seen = zoo.tap(model, inputs)
        call = seen._calls[seen.layers[-1]]
        batch, heads, _, size = call.query.shape
        with FlopCounterMode(display=False) as counted, tiny_models.Sizes() as sizes:
            seen.weights(pooled)
        assert not any(shape.count(length) > 1 for _, shape in sizes.seen), sizes.seen
        flops.append(counted.get_total_flops())
        assert flops[-1] == 4 * batch * heads * length * size  # q·k, and the check that weights·v is the output
        elements.append(sum(torch.Size(shape).numel() for _, shape in sizes.seen))
        assert max(torch.Size(shape).numel() for _, shape in sizes.seen) <= batch * heads * length * size
    growth = [later / earlier for earlier, later in itertools.pairwise(elements)]
    assert all(1.5 < g <= 2.0 for g in growth), growth


def test_layers_beyond_the_model_are_refused_with_their_number() -> None:
    model = zoo.build("gpt2")
    for layer in (3, -4, [0, 7]):
        with pytest.raises(ModelError, match=r"layers: got (3|-4|7); expected a layer of GPT2.*which has 3: 0 to 2"):
            attention_row(model, layer)
    with pytest.raises(ConfigError, match="attention_row.layers"):
        attention_row(model, "frist")


def test_only_the_chosen_layers_are_kept() -> None:
    model = zoo.build("gpt2")
    inputs, pooled = zoo.inputs_of("gpt2", "left")
    seen = zoo.tap(model, inputs, [-1, 0])
    assert seen.layers == (0, 2) and set(seen._calls) == {0, 2}
    assert seen.layer_weights(pooled).shape == (3, 2, 4, 12)
    assert torch.equal(seen.layer_weights(pooled)[:, 1], seen.weights(pooled))
    with pytest.raises(ModelError, match="layer 1'; expected one of the chosen layers"):
        seen.attention(attention_spec(layers=1), pooled)
    with pytest.raises(ModelError, match='rollout.*layers="all"'):
        seen.rollout(pooled)


BAD = [
    ({"layers": "first"}, "attention.layers"),
    ({"layers": 1.5}, "attention.layers"),
    ({"layers": True}, "attention.layers"),
    ({"layers": []}, "attention.layers"),
    ({"layers": None}, "attention.layers"),
    ({"layers": [0, "last"]}, "attention.layers"),
    ({"heads": "median"}, "attention.heads"),
    ({"heads": 3}, "attention.heads"),
    ({"rollout": 1}, "attention.rollout"),
    ({"rollout": True, "layers": [0]}, "attention.rollout"),
    ({"rollout": True, "heads": "max"}, "attention.rollout"),
]


@pytest.mark.parametrize(("settings", "field"), BAD, ids=str)
def test_settings_are_checked_at_construction(settings: dict, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field}: got .*; expected"):
        credit.attention(**settings)


def test_the_papers_reading_needs_the_plain_key_and_others_their_own() -> None:
    usual = [{}, {"layers": -1}, {"layers": [-1]}, {"layers": "last", "heads": "mean", "rollout": False}]
    assert all(credit.attention(**settings).needs == {"reward_attention"} for settings in usual)
    key = EvidenceKey("reward_attention", layers=[-2, -1], heads="mean")
    assert credit.attention(layers=[-1, -2]).needs == credit.attention(layers=(-2, -1, -2)).needs == {key}
    assert credit.attention(rollout=True).needs == {EvidenceKey("reward_attention", rollout=True)}
    for settings in SETTINGS:
        (name,) = credit.attention(**settings).needs
        assert EvidenceKey.of(name).name == "reward_attention" and requested_attention(name) == attention_spec(
            **settings
        )
    assert requested_attention("reward_attention") == AttentionSpec()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_credit_spreads_by_the_evidence_it_requested(settings: dict) -> None:
    method = credit.attention(mix=1.0, **settings)
    mask = helpers.bools([[1, 1, 1, 0]])
    (name,) = method.needs
    other = {"reward_attention": torch.tensor([[9.0, 0, 0, 0]])}
    batch = helpers.rollouts(mask, [name], scores=torch.tensor([2.0])).with_evidence(
        **other, **{name: torch.tensor([[1.0, 2, 1, 5]])}
    )
    torch.testing.assert_close(credit.apply(method, batch)[0], torch.tensor([[0.5, 1.0, 0.5, 0.0]]))
    with pytest.raises(DataError, match="evidence"):
        credit.apply(method, helpers.rollouts(mask, ["reward_attention"]))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


def test_several_askings_share_one_forward_and_each_gets_its_own(world: Path) -> None:
    reward = tiny_runs.judge(world)
    batch = tiny_runs.rollouts_of(
        tiny_runs.prompts(4), [[50, 60, 70, 80, 90], [33, 1], [44], [21, 22, 23, 24]], extra=2
    )
    names = {
        name: settings for settings in [{}, *SETTINGS[:4], SETTINGS[5]] for name in credit.attention(**settings).needs
    }
    forwards: list[int] = []
    handle = reward.model.register_forward_hook(lambda *_: forwards.append(1))
    found = reward_evidence(reward, batch, frozenset(names) | {"scores"})
    handle.remove()
    assert len(forwards) == 1 and set(found) == set(names) | {"scores"}
    model = AutoModelForSequenceClassification.from_pretrained(world / "reward", attn_implementation="eager").eval()
    for row in range(4):
        prompt, response = tiny_runs.alone(batch, row)
        with torch.no_grad():
            out = model(torch.tensor([prompt + response]), output_attentions=True)
        matrices = torch.stack(out.attentions)
        for name, settings in names.items():
            expected = by_hand(matrices, torch.tensor([len(prompt + response) - 1]), settings)[0, len(prompt) :]
            torch.testing.assert_close(found[name][row, : len(response)], expected, rtol=0, atol=1e-5)
            assert (found[name][row, len(response) :] == 0).all()


def test_a_batch_scored_for_such_a_credit_and_a_layer_that_is_not_there(world: Path) -> None:
    models = tiny_runs.models(world)
    batch = tiny_runs.sampled(models.policy, tiny_runs.prompts(5))
    for settings in SETTINGS[:4]:
        method = credit.attention(**settings)
        whole, parts = (score(models, batch, method.needs, ScoreConfig(micro_batch=n)) for n in (5, 2))
        rewards = [credit.apply(method, scored)[0] for scored in (whole, parts)]
        torch.testing.assert_close(rewards[0], rewards[1], rtol=0, atol=1e-5)
        torch.testing.assert_close(rewards[0].sum(dim=1), whole.scores, rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="layers: got 40; expected a layer of Llama"):
        score(models, batch, credit.attention(layers=40).needs, ScoreConfig())


def test_one_text_apportioned_by_other_layers_and_the_rollout(world: Path) -> None:
    """`apportion credit` reads them too, beside the paper's, in one forward."""
    reward = tiny_runs.judge(world)
    specs = [("attention", {"mix": 1.0, **settings}) for settings in ({}, {"layers": 0}, {"rollout": True})]
    methods = {str(spec[1]): text_methods([spec])["attention"] for spec in specs}
    forwards: list[int] = []
    handle = reward.model.register_forward_hook(lambda *_: forwards.append(1))
    found = apportion_text(reward, "", "one two three four", methods)
    handle.remove()
    credits = [torch.tensor(rewards) for rewards in found.methods.values()]
    assert len(forwards) == 1 and not torch.equal(credits[0], credits[1])
    for rewards in credits:
        torch.testing.assert_close(rewards.sum(), torch.tensor(found.score), rtol=1e-5, atol=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(world / "reward", attn_implementation="eager").eval()
    with torch.no_grad():
        matrices = torch.stack(model(torch.tensor([found.ids]), output_attentions=True).attentions)
    for (_, settings), rewards in zip(specs, credits, strict=True):
        alpha = by_hand(matrices, torch.tensor([len(found.ids) - 1]), settings)[0]
        torch.testing.assert_close(rewards, alpha / alpha.sum() * found.score, rtol=0, atol=1e-5)
