"""Fast kernels, split optimizer states, shared prompts and micro-batches against plain computations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_runs
import torch
import zoo
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

from apportion.batching import micro_batches, trim
from apportion.config import LoraConfig
from apportion.credit import AttentionSpec
from apportion.distributed.grad_norm import GPU_BLOCK, total_norm
from apportion.evidence.reward import sharing
from apportion.generation.llama import LlamaStepModel, product
from apportion.generation.sampler import make_step_model
from apportion.generation.step_model import StepModel
from apportion.models.fast import has_fast_kernels, use_fast_kernels, use_packed_weights
from apportion.models.fast import token_logprobs as blocks
from apportion.models.fast.linear import FlatLinear, LowRank, linear_parts, use_fast_linear
from apportion.models.fast.norms import FAST, Gate, RMSNorm, use_fast_norms
from apportion.models.fast.onednn import can_pack
from apportion.models.fast.token_logprobs import token_logprobs
from apportion.models.lora import add_adapter
from apportion.models.master_weights import (
    MasterAdamW,
    join,
    split,
    to_float32,
    to_sixteen_bit,
)
from apportion.models.policy import Policy, plain_head
from apportion.models.reward import RewardModel, load_reward
from apportion.models.shared_prompt import shared_prompts
from apportion.stages.rl.models import make_policy
from apportion.training.state import pack_state, unpack_state


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    """Return normal numbers."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype).requires_grad_(grad)


def assert_near(found: Any, expected: Any, within: float) -> None:
    """Check that tensors differ by at most `within` of the expected one's length."""
    for one, two in zip(found, expected, strict=True):
        assert (one.double() - two.double()).norm() <= within * two.double().norm().clamp_min(1e-6)


# --- log-probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_token_logprobs_are_a_log_softmax(
    monkeypatch: pytest.MonkeyPatch, temperature: float, frozen: bool, again: bool
) -> None:
    """In blocks of 3 rows, widened 2 at a time; banned ids have no mass and their states' gradient is finite."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 3 * 50)
    monkeypatch.setattr(blocks, "ROWS_ELEMENTS", 2 * 50)
    monkeypatch.setattr(blocks, "SAVED_ELEMENTS", 0 if again else 1 << 20)
    states, weight, bias = random(11, 8, grad=True), random(50, 8, seed=1, grad=not frozen), random(50, seed=2)
    bias.requires_grad_(not frozen)
    banned, ids = torch.tensor([0, 49]), torch.arange(1, 12)
    logits = (states @ weight.T + bias).double() / temperature
    expected = logits.index_fill(1, banned, -torch.inf).log_softmax(dim=-1)
    chosen = expected.gather(1, ids[:, None]).squeeze(1)
    found, entropy = token_logprobs(states, weight, bias, ids, banned, temperature, True)
    assert entropy is not None and not entropy.requires_grad
    assert_near([found, entropy], [chosen, -(expected.exp() * expected.clamp_min(-1e4)).sum(dim=-1)], 1e-6)
    push = random(11, seed=3)
    wanted = [states] if frozen else [states, weight, bias]
    assert_near(torch.autograd.grad(found, wanted, push), torch.autograd.grad(chosen, wanted, push.double()), 1e-6)


def test_a_state_with_the_largest_logits_of_16_bit_is_no_problem() -> None:
    states, weight = random(4, 8, dtype=torch.bfloat16, grad=True), 400 * random(50, 8, seed=1, dtype=torch.bfloat16)
    found, _ = token_logprobs(states, weight, None, torch.tensor([1, 2, 3, 4]), torch.tensor([0]))
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(states.grad).all() and found.min() < -1000


def test_a_capped_head_is_not_taken_for_a_plain_one() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = tiny_models.WIDE | tiny_models.SHARED_KEYS | {"head_dim": 8}
    assert not plain_head(Gemma2ForCausalLM(Gemma2Config(vocab_size=99, final_logit_softcapping=5.0, **sizes)).eval())
    assert plain_head(tiny_runs.causal("gpt2"))


# --- float32 masters --------------------------------------------------------------------------------------------------


def test_split_and_join_lose_no_bit() -> None:
    numbers = torch.cat(
        [random(4000) * 10.0 ** torch.arange(-20, 20).repeat(100), torch.tensor([0.0, -0.0, torch.inf])]
    )
    ties = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000], dtype=torch.int32).view(torch.float32)
    for master in (numbers, ties):
        weight, remainder = split(master)
        assert weight.dtype == torch.bfloat16 and remainder.dtype == torch.int16
        assert torch.equal(join(weight, remainder).view(torch.int32), master.view(torch.int32))
    weight, _ = split(numbers)
    assert (weight == numbers.bfloat16()).float().mean() > 0.999  # nearest; ties alone may differ


def layers(width: int = 700) -> nn.Module:
    """Return parameters of several shapes, one larger than a block."""
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(width, 900), nn.Linear(5, 3, bias=False), nn.LayerNorm(7)])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_on_split_weights_are_adamws_on_float32(monkeypatch: pytest.MonkeyPatch, decay: float) -> None:
    """The same bits after 20 steps, from the same 16-bit gradients; plain bfloat16 weights would not have moved."""
    monkeypatch.setattr("apportion.models.master_weights.BLOCK", 1 << 12)
    plain, halves = layers(), layers()
    start = [p.detach().clone() for p in plain.parameters()]
    remainders = to_sixteen_bit(halves)
    one = torch.optim.AdamW(plain.parameters(), lr=1e-6, weight_decay=decay, fused=True)
    two = MasterAdamW(halves.parameters(), lr=1e-6, weight_decay=decay, remainders=remainders)
    for step in range(20):
        for number, (p, h) in enumerate(zip(plain.parameters(), halves.parameters(), strict=True)):
            h.grad = random(*p.shape, seed=100 * step + number, dtype=torch.bfloat16)
            p.grad = h.grad.float()
        one.step()
        two.step()
    moved = torch.cat([(h.detach() != s.bfloat16()).flatten() for h, s in zip(halves.parameters(), start, strict=True)])
    assert moved.float().mean() < 0.2  # the halves that the model computes with hardly show it
    to_float32(remainders)
    assert not remainders
    assert all(torch.equal(p, h) for p, h in zip(plain.parameters(), halves.parameters(), strict=True))


def test_moments_in_16_bit_follow_those_in_32() -> None:
    """A second moment of steps 0.001 stands still if it is rounded to nearest; rounded at random it follows."""
    halves = [layers(30), layers(30)]
    made = [to_sixteen_bit(h) for h in halves]
    optimizers = [
        MasterAdamW(h.parameters(), lr=1e-4, remainders=r, moments=m)
        for h, r, m in zip(halves, made, ("float32", "bfloat16"), strict=True)
    ]
    for step in range(300):
        for half, optimizer in zip(halves, optimizers, strict=True):
            for number, p in enumerate(half.parameters()):
                size = 1.0 if step < 100 else 0.5
                p.grad = (size * random(*p.shape, seed=100 * step + number)).bfloat16()
            optimizer.step()
    wide, narrow = (o.state[next(h.parameters())]["exp_avg_sq"] for h, o in zip(halves, optimizers, strict=True))
    assert narrow.dtype == torch.bfloat16 and wide.dtype == torch.float32
    assert float(narrow.float().mean() / wide.mean()) == pytest.approx(1.0, abs=0.01)
    moved = [torch.cat([join(p, r).flatten() for p, r in m.items()]) for m in made]
    start = torch.cat([p.detach().flatten() for p in layers(30).parameters()])
    assert (moved[0] - start).norm() > 1e-3 * start.norm()
    assert (moved[1] - moved[0]).norm() < 0.1 * (moved[0] - start).norm()


def test_a_restored_optimizer_rounds_as_an_uninterrupted_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks as a GPU has them, a small weight before a large one: the noise must not depend on the steps before."""
    monkeypatch.setattr("apportion.models.master_weights.block", lambda device: GPU_BLOCK)

    def make() -> tuple[nn.ModuleList, dict[nn.Parameter, torch.Tensor], MasterAdamW]:
        torch.manual_seed(0)
        module = nn.ModuleList([nn.Linear(40, 50, bias=False), nn.Linear(1100, 1000, bias=False)])
        remainders = to_sixteen_bit(module)
        return module, remainders, MasterAdamW(module.parameters(), lr=1e-3, remainders=remainders, moments="bfloat16")

    def step(module: nn.ModuleList, optimizer: MasterAdamW, seed: int) -> None:
        for number, p in enumerate(module.parameters()):
            p.grad = random(*p.shape, seed=seed + number, dtype=torch.bfloat16)
        optimizer.step()

    (going, _, first), (fresh, remainders, second) = make(), make()
    step(going, first, 10)
    kept = pack_state([*going.parameters()], first)
    stored = {room: {name: value.clone() for name, value in part.items()} for room, part in kept.items()}
    unpack_state(stored, [*fresh.parameters()], second, remainders)
    step(going, first, 20)
    step(fresh, second, 20)
    for p, q in zip(going.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(value, second.state[q][name]) for name, value in first.state[p].items())


def test_the_norm_of_all_gradients() -> None:
    model = layers()
    for number, p in enumerate(model.parameters()):
        p.grad = random(*p.shape, seed=number)
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm()
    assert float(total_norm(model.parameters())) == pytest.approx(float(expected), rel=1e-5)
    for p in model.parameters():
        p.data, p.grad = p.data.bfloat16(), None
        p.grad = random(*p.shape, seed=1, dtype=torch.bfloat16)
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm()
    assert float(total_norm(model.parameters())) == pytest.approx(float(expected), rel=1e-5)
    assert float(total_norm([])) == 0.0


# --- linear layers and adapters ---------------------------------------------------------------------------------------


def test_a_strided_input_gives_the_same_product_and_gradients() -> None:
    layer = nn.Linear(6, 5)
    quick = copy.deepcopy(layer)
    use_fast_linear(quick)
    assert type(quick) is FlatLinear
    x = random(2, 6, 3, grad=True)
    for frozen in (False, True):
        layer.requires_grad_(not frozen), quick.requires_grad_(not frozen)
        outs = [each(x.transpose(1, 2)) for each in (layer, quick)]
        torch.testing.assert_close(outs[1], outs[0])
        grads = [torch.autograd.grad(out, [x], random(2, 3, 5), retain_graph=True)[0] for out in outs]
        torch.testing.assert_close(grads[1], grads[0])


def adapted(dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny Llama with adapters that do something, on every linear layer."""
    torch.manual_seed(0)
    sizes = tiny_models.WIDE | tiny_models.SHARED_KEYS
    model = LlamaForCausalLM(LlamaConfig(vocab_size=99, pad_token_id=0, **sizes)).to(dtype).eval()
    use_fast_kernels(model)
    model = add_adapter(model, LoraConfig(rank=4, alpha=6.0, targets="all"))
    with torch.no_grad():
        for number, p in enumerate(q for q in model.parameters() if q.requires_grad):
            p.copy_(0.2 * random(*p.shape, seed=number))
    return model


def test_adapters_compute_what_pefts_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.layer import Linear as PeftLinear

    model = adapted()
    layer: Any = next(m for m in model.modules() if isinstance(m, PeftLinear))
    assert type(layer) is not PeftLinear and linear_parts(layer) is not None
    x = random(2, 3, layer.in_features, grad=True)
    trained = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    found, expected = layer(x), PeftLinear.forward(layer, x)
    assert_near([found], [expected], 1e-6)
    push = random(*found.shape, seed=5)
    both = [torch.autograd.grad(out, [x, *trained], push) for out in (found, expected)]
    assert_near(*both, 1e-6)
    with torch.no_grad():
        assert_near([product([layer])(x[0])], [found[0]], 1e-6)
    with model.disable_adapter():
        torch.testing.assert_close(layer(x), layer.base_layer(x))
        parts = linear_parts(layer)
        assert parts is not None and parts.down is None
    assert not torch.allclose(found, layer.base_layer(x))


def test_16_bit_adapters_are_as_near_to_float32_as_pefts() -> None:
    weight, down, up, x = (random(*s, seed=i) for i, s in enumerate([(40, 30), (4, 30), (40, 4), (50, 30)]))
    exact = x @ weight.T + 1.5 * (x @ down.T) @ up.T
    low, frozen = x.bfloat16(), weight.bfloat16()
    found = LowRank.apply(low, frozen, None, down, up, 1.5)
    theirs = (low @ frozen.T + (low.float() @ down.T) @ up.T * 1.5).to(torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() < 2 * (theirs.double() - exact).norm()


@pytest.mark.skipif(not can_pack(torch.zeros(1, dtype=torch.bfloat16)), reason="no native bfloat16 products here")
def test_packed_frozen_weights_change_values_and_gradients_by_rounding_alone() -> None:
    exact, low = adapted(), adapted(torch.bfloat16)
    ids, push = torch.arange(1, 41).view(4, 10), random(4, 10, 99, seed=7)

    def outputs(model: Any) -> list[Tensor]:
        logits = model(ids).logits.float()
        trained = [p for p in model.parameters() if p.requires_grad]
        return [logits, *torch.autograd.grad(logits, trained, push)]

    truth, plain = outputs(exact), outputs(low)
    with use_packed_weights(low):
        layers = [m for m in low.modules() if type(m) is FlatLinear and m.packed is not None]
        assert len(layers) >= 14  # all of both layers; the head of a causal model is tied to what may learn
        found = outputs(low)
    assert not any(layer.packed for layer in layers)
    for one, usual, right in zip(found, plain, truth, strict=True):
        assert (one - right).norm() < 1.5 * (usual - right).norm() + 1e-6
    with torch.no_grad():  # packs are what is multiplied inside
        with use_packed_weights(low):
            layers[0].weight.zero_()
            assert torch.equal(low(ids).logits.float(), found[0])
        assert not torch.equal(low(ids).logits.float(), found[0])


# --- the switch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
def test_without_fast_kernels_every_layer_is_the_libraries_own(world: Path, rank: int) -> None:
    """The same log-probabilities, values, gradients and samples to float32 rounding, with and without them."""

    def load(on: bool) -> Policy:
        torch.manual_seed(0)  # adapters are initialised at random
        return tiny_runs.policy(world, **{"lora.rank": rank, "dtype": "float32", "fast_kernels": on})

    fast, plain = load(True), load(False)
    assert has_fast_kernels(fast.model) and not has_fast_kernels(plain.model)
    ours = {type(m).__module__ for m in plain.model.modules() if type(m).__module__.startswith("apportion")}
    assert not ours, "a layer of ours is left"
    batch, results = ragged_groups(), []
    for policy in (fast, plain):
        out = policy.forward(batch, entropy=True)
        loss = out.logprobs.sum() + out.values.sum()
        gradients = torch.autograd.grad(loss, policy.trainable(), allow_unused=True)
        flat = torch.cat([g.flatten() for g in gradients if g is not None])
        results.append([*(t.detach() for t in out if t is not None), flat])
    assert_near(*results, 1e-5)
    kinds = [type(make_step_model(p, p.model, 2, 9)) for p in (fast, plain)]
    assert kinds == [LlamaStepModel, StepModel]
    one, two = (tiny_runs.sampled(policy, tiny_runs.prompts(), max_new_tokens=8) for policy in (fast, plain))
    assert torch.equal(one.response_ids, two.response_ids)
    torch.testing.assert_close(one.logprobs, two.logprobs, rtol=0, atol=1e-5)


def test_a_reward_model_without_fast_kernels_gives_the_same_scores(world: Path) -> None:
    batch = ragged_groups()
    ids = torch.cat([batch.prompt_ids, batch.response_ids], dim=1)
    mask = torch.cat([batch.prompt_mask, batch.valid], dim=1)
    rewards = [load_reward(str(world / "reward"), device="cpu", fast_kernels=on) for on in (True, False)]
    assert [has_fast_kernels(reward.model) for reward in rewards] == [True, False]
    with use_packed_weights(rewards[1].model):
        assert_near(*([reward.score(ids, mask)[0]] for reward in rewards), 1e-5)


# --- norms and gated units --------------------------------------------------------------------------------------------


def test_norms_and_gates_have_autograds_gradients() -> None:
    x, weight, up = random(3, 5, 16, grad=True), random(16, seed=1, grad=True), random(3, 5, 16, seed=2, grad=True)
    plain = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
    found, push = RMSNorm.apply(x, weight, 1e-5), random(3, 5, 16, seed=3)
    torch.testing.assert_close(found, plain)
    assert_near(torch.autograd.grad(found, [x, weight], push), torch.autograd.grad(plain, [x, weight], push), 1e-6)
    gated, expected = Gate.apply(x, up), nn.functional.silu(x) * up
    assert torch.equal(gated, expected)
    assert_near(torch.autograd.grad(gated, [x, up], push), torch.autograd.grad(expected, [x, up], push), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llama_with_fast_norms_has_the_same_output(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = tiny_models.WIDE | tiny_models.SHARED_KEYS
    model = LlamaForCausalLM(LlamaConfig(vocab_size=99, pad_token_id=0, **sizes)).to(dtype).eval()
    ids = torch.arange(1, 15)[None]
    before, names = model(ids).logits, [type(m).__name__ for m in model.modules()]
    before.float().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    use_fast_norms(model)
    after = model(ids).logits
    assert torch.equal(after, before)
    after.float().sum().backward()
    assert_near([p.grad for p in model.parameters()], gradients, 1e-5 if dtype == torch.float32 else 0.03)
    changed = {type(m).__name__ for m in model.modules()} - set(names)
    assert changed == {"FastLlamaRMSNorm", "FastLlamaMLP"} and len(FAST) >= 2


def test_norms_of_another_kind_are_left_as_they_are() -> None:
    """Gemma's weights are one less than what it multiplies with, and its gate is no SiLU."""
    sizes = tiny_models.WIDE | tiny_models.SHARED_KEYS | {"head_dim": 8}
    model = GemmaForCausalLM(GemmaConfig(vocab_size=99, pad_token_id=0, **sizes)).eval()
    for p in model.parameters():
        p.data.add_(0.1)
    before = [type(m) for m in model.modules()]
    use_fast_norms(model)
    assert [type(m) for m in model.modules()] == before


# --- shared prompts ---------------------------------------------------------------------------------------------------


def ragged_groups(extra: int = 0) -> Any:
    """Return rollouts of three prompts with 3, 1 and 4 responses of unequal length, the groups interleaved."""
    prompts = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23, 24], [30, 31, 32, 33, 34, 35]]
    chosen = [0, 2, 0, 1, 2, 0, 2, 2]
    responses = [[40 + i + j for j in range(2 + (3 * i) % 4)] for i in range(8)]
    batch = tiny_runs.rollouts_of([prompts[c] for c in chosen], responses, extra=extra)
    from dataclasses import replace

    return replace(batch, group=torch.tensor(chosen))


SHARING = ["llama (grouped queries)", "gpt2", "opt", "gpt-neox", "qwen3 (q/k norm)"]


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("extra", [0, 3])
def test_a_prompt_read_once_changes_nothing(name: str, extra: int) -> None:
    """Log-probabilities, values, entropy and every gradient, beside whole rows."""
    torch.manual_seed(0)
    policy = Policy(tiny_runs.causal(name), tiny_runs.tiny.tokenizer(), [tiny_runs.PAD], nn.Linear(32, 1))
    batch = ragged_groups(extra)
    assert policy.shares and policy.shared_prompts(batch) is not None
    forwards: list[int] = []
    handle = policy.model.register_forward_hook(lambda *_: forwards.append(1))
    both = []
    for share in (True, False):
        policy.shares = share
        out = policy.forward(batch, entropy=True)
        weights = random(*batch.mask.shape, seed=4)
        loss = (weights * out.logprobs).sum() + (weights * out.values).sum() + out.after.sum()
        trained = [p for p in policy.trainable() if p.requires_grad]
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        flat = torch.cat([g.flatten() for g in gradients if g is not None])  # some are 0 in theory, as OPT's key bias
        both.append([*(t.detach() for t in out if t is not None), flat])
    handle.remove()
    assert len(forwards) == 3  # prompts and responses; then whole rows
    assert_near(*both, 1e-5)


def test_windows_and_capped_heads_read_rows_whole() -> None:
    policy = Policy(tiny_runs.causal("mistral (window 4)"), tiny_runs.tiny.tokenizer(), [tiny_runs.PAD])
    assert not policy.shares and policy.shared_prompts(ragged_groups()) is None


def test_prompts_are_shared_where_they_are_the_same_and_it_pays() -> None:
    from dataclasses import replace

    batch = ragged_groups()
    found = shared_prompts(batch)
    assert found is not None and found.prompt.tolist() == [0, 2, 0, 1, 2, 0, 2, 2] and found.first.tolist() == [0, 3, 1]
    assert shared_prompts(replace(batch, group=torch.arange(8))) is None  # nothing to share
    assert shared_prompts(replace(batch, group=torch.zeros(8, dtype=torch.int64))) is None  # the prompts differ
    long = tiny_runs.rollouts_of([[5]] * 4, [[50] * 40] * 4)
    assert shared_prompts(replace(long, group=torch.zeros(4, dtype=torch.int64))) is None  # one token of 41


# --- micro-batches ----------------------------------------------------------------------------------------------------


def test_micro_batches_by_hand() -> None:
    """Lengths 9, 7, 9, 6, …: the longest first, at most 3 rows and 20 positions, a single row always."""
    prompts = [[5] * n for n in (4, 2, 4, 1, 6)]
    batch = tiny_runs.rollouts_of(prompts, [[50] * n for n in (5, 5, 5, 5, 30)])
    groups = [g.tolist() for g in micro_batches(batch, torch.arange(5), 3, 20)]
    assert groups == [[4], [0, 2], [1, 3]]
    assert [g.tolist() for g in micro_batches(batch, torch.tensor([3, 1]), 1, 100)] == [[1], [3]]


def test_responses_to_one_prompt_go_together_and_it_counts_once() -> None:
    batch = ragged_groups()
    groups = [g.tolist() for g in micro_batches(batch, torch.arange(8), 8, 6 + 4 * 5)]
    assert groups[0] in ([0, 2, 5], [1, 4, 6, 7])
    assert sorted(i for group in groups for i in group) == list(range(8))
    for group in groups:
        rows = batch.select(torch.tensor(group))
        size = len(set(rows.group.tolist())) * int(rows.prompt_mask.sum(1).max()) + len(group) * int(
            rows.mask.sum(1).max()
        )
        assert size <= 26


def test_trimming_takes_columns_that_are_padding_everywhere() -> None:
    batch = ragged_groups(extra=3).with_evidence(
        values=torch.zeros(8, 8), score=torch.zeros(8), wide=torch.zeros(8, 8, 2)
    )
    some = trim(batch.select(torch.tensor([3])))
    assert some.prompt_ids.tolist() == [[20, 21, 22, 23, 24]] and some.prompt_mask.all()
    length = int(batch.mask[3].sum())
    assert some.mask.shape == (1, length) and some.mask.all()
    assert {k: tuple(v.shape) for k, v in some.evidence.items()} == {
        "values": (1, length),
        "score": (1,),
        "wide": (1, length, 2),
    }
    whole = trim(some)
    assert whole is some


def test_loading_leaves_heads_and_sharing_known(world: Path) -> None:
    policy = make_policy(tiny_runs.config(world))
    assert policy.plain and policy.shares


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama (grouped queries)", "gpt2", "opt", "gpt-neox (partial rotary)", "qwen2"])
@pytest.mark.parametrize("extra", [0, 3])
def test_a_reward_model_reads_a_prompt_once(name: str, kernel: str, extra: int) -> None:
    """Scores, positions and attention rows of whole rows, in the last layer and in all of them."""
    reward = RewardModel(zoo.build(name, kernel, labels=2), tiny_runs.tiny.tokenizer())
    reward.model.config.get_text_config().pad_token_id = tiny_runs.PAD
    batch = ragged_groups(extra)
    shared, readings = shared_prompts(batch), [AttentionSpec(), AttentionSpec(heads="max", layers="all")]
    assert shared is not None and sharing(reward, batch, readings) is not None
    ids = torch.cat([batch.prompt_ids, batch.response_ids], dim=1)
    mask = torch.cat([batch.prompt_mask, batch.valid], dim=1)
    scores, rows, positions = reward.forward(ids, mask, readings)
    found, found_rows, found_positions = reward.forward_shared(batch, shared, readings)
    assert torch.equal(found_positions, positions)
    assert_near([found, *found_rows], [scores, *rows], 2e-5)
    assert torch.equal(reward.forward_shared(batch, shared, [])[0], found)
    assert sharing(reward, batch, [AttentionSpec(rollout=True)]) is None
