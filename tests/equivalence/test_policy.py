"""The policy on tiny real models: where values are read, what padding may not change, reference, adapters, saving."""

from __future__ import annotations

import gc
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_runs
import torch
from transformers import AutoModelForCausalLM, LlamaModel

from apportion.config import LoraConfig
from apportion.losses import clipped_policy
from apportion.models.loading import load_causal, locate
from apportion.models.lora import add_adapter, target_names
from apportion.models.policy import Policy
from apportion.models.saving import save_policy
from apportion.stages.rl.models import make_policy

CPU = torch.device("cpu")
ARCHITECTURES = ["llama (grouped queries)", "gpt2", "opt", "gpt-neox", "mistral (window 4)", "qwen3 (q/k norm)"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


def ragged(extra: int = 0):
    """Return rollouts with ragged prompts and responses, one of them an EOS alone."""
    responses = [[50, 60, 70, 80, 90], [33, tiny_runs.EOS], [tiny_runs.EOS], [21, 22, 23, tiny_runs.EOS]]
    return tiny_runs.rollouts_of(tiny_runs.prompts(4), responses, extra=extra)


def ending(world: Path, **changes: object) -> Policy:
    """Return a policy that may write EOS, as `ragged` does."""
    return tiny_runs.policy(world, **{"sampling.stop": "eos"} | changes)


def on(name: str) -> Policy:
    """Return a policy of another architecture with a head that is not zero."""
    model = tiny_runs.causal(name)
    head = torch.nn.Linear(32, 1)
    return Policy(model, tiny.tokenizer(), [tiny_runs.PAD], head)


def small(batch):
    """Return the batch with ids that a vocabulary of 99 has."""
    return replace(batch, prompt_ids=batch.prompt_ids % 99, response_ids=batch.response_ids % 99)


@torch.no_grad()
def by_hand(policy: Policy, prompt: list[int], response: list[int]):
    """Return (log-probabilities (T,), values (T+1,), entropies (T,)) of one row without padding, in a plain forward."""
    out = policy.model(torch.tensor([prompt + response]), output_hidden_states=True)
    logits = out.logits[0, len(prompt) - 1 : -1].clone() / policy.temperature
    logits[:, policy.banned] = -torch.inf
    logp = logits.log_softmax(dim=-1)
    states = out.hidden_states[-1][0, len(prompt) - 1 :]  # position P+t−1 for response token t
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(dim=-1)
    return logp[torch.arange(len(response)), response], policy.value_head(states).squeeze(-1), entropy


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("extra", [0, 3])
def test_a_padded_batch_equals_its_rows_computed_by_hand(name: str, extra: int) -> None:
    """Log-probabilities, values (state P+t−1), the value after the last token and entropy, whatever the padding."""
    policy, batch = on(name), small(ragged(extra))
    out = policy.forward(batch, entropy=True)
    for row in range(4):
        prompt, response = tiny_runs.alone(batch, row)
        logprobs, values, entropy = by_hand(policy, prompt, response)
        n = len(response)
        torch.testing.assert_close(out.logprobs[row, :n], logprobs, rtol=0, atol=2e-5)
        torch.testing.assert_close(out.values[row, :n], values[:-1], rtol=0, atol=2e-5)
        torch.testing.assert_close(out.after[row], values[-1], rtol=0, atol=2e-5)
        torch.testing.assert_close(out.entropy[row, :n], entropy, rtol=0, atol=2e-5)
    off = ~batch.mask
    assert off.any()
    for values in (out.logprobs, out.values, out.entropy):
        assert (values[off] == 0).all()
    assert out.values[batch.mask].std() > 0.01, "values that are all alike cannot tell one position from another"


@pytest.mark.parametrize("attended", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_token_after_a_hole_is_predicted_from_the_last_token_before_it(name: str, attended: bool) -> None:
    """A tool's output within a response: tokens that the policy did not sample. Where it attends to them they are
    context; where it does not, the row is that of the other tokens alone, wherever the hole is."""
    policy = on(name)
    responses = [[50, 60, 70, 80, 90, 95], [33, 34, 35, 36, 37], [21, 22, 23, 24], [61, 62, 63]]
    holes = [[2, 3], [0], [1], []]
    batch = small(tiny_runs.rollouts_of(tiny_runs.prompts(4), responses, extra=2))
    mask = batch.mask.clone()
    for row, places in enumerate(holes):
        mask[row, places] = False
    batch = replace(batch, mask=mask, valid=batch.mask if attended else mask)
    out = policy.forward(batch, entropy=True)
    for row, places in enumerate(holes):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]].tolist()
        seen = batch.response_ids[row][batch.valid[row]].tolist()
        logprobs, values, entropy = by_hand(policy, prompt, seen)
        mine = [i for i, t in enumerate(batch.valid[row].nonzero().squeeze(1).tolist()) if mask[row, t]]
        assert len(mine) == len(responses[row]) - len(places)
        on_mask = mask[row]
        torch.testing.assert_close(out.logprobs[row, on_mask], logprobs[mine], rtol=0, atol=2e-5)
        torch.testing.assert_close(out.values[row, on_mask], values[mine], rtol=0, atol=2e-5)
        torch.testing.assert_close(out.after[row], values[-1], rtol=0, atol=2e-5)
        torch.testing.assert_close(out.entropy[row, on_mask], entropy[mine], rtol=0, atol=2e-5)
    assert (out.logprobs[~mask] == 0).all() and (out.values[~mask] == 0).all()


@pytest.mark.parametrize("rank", [0, 4])
def test_a_hole_in_several_responses_to_one_prompt(world: Path, rank: int) -> None:
    """Prompts that are computed once, a trunk of its own, and gradients: as for the tokens without the hole."""
    policy = ending(world, **{"ppo.value_model": "separate", "lora.rank": rank})
    prompt, rows = tiny_runs.prompts(3)[2] * 3, [[50, 60, 70, 80], [33, 34, 35], [21, 22]]
    batch = replace(tiny_runs.rollouts_of([prompt] * 3, rows), group=torch.zeros(3, dtype=torch.int64))
    assert policy.shared_prompts(batch) is not None
    plain = policy.forward(batch, entropy=True)
    spaced = [[row[0], 300, 301, *row[1:]] for row in rows]
    held = replace(tiny_runs.rollouts_of([prompt] * 3, spaced), group=batch.group)
    mask = held.mask & ~torch.tensor([[False, True, True, False, False, False]])
    held = replace(held, mask=mask, valid=mask)
    out = policy.forward(held, entropy=True)
    for one, two in zip(plain[:2], out[:2], strict=True):
        torch.testing.assert_close(two[mask], one[batch.mask], rtol=0, atol=2e-5)
    torch.testing.assert_close(out.after, plain.after, rtol=0, atol=2e-5)
    torch.testing.assert_close(policy.reference_logprobs(held)[mask], policy.reference_logprobs(batch)[batch.mask])
    gradients = [torch.autograd.grad(o.logprobs.sum() + o.values.sum(), policy.trainable()) for o in (plain, out)]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value_model", ["shared", "separate"])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_value_at_t_depends_on_tokens_before_t_only(world: Path, value_model: str, rank: int) -> None:
    policy = ending(world, **{"ppo.value_model": value_model, "lora.rank": rank})
    batch = tiny_runs.rollouts_of(tiny_runs.prompts(1), [[50, 60, 70, 80, 90]])
    before = policy.forward(batch)
    for t in range(5):
        ids = batch.response_ids.clone()
        ids[0, t] = 200
        out = policy.forward(replace(batch, response_ids=ids))
        values = torch.cat([out.values[0], out.after])
        unchanged = torch.cat([before.values[0], before.after])
        torch.testing.assert_close(values[: t + 1], unchanged[: t + 1], rtol=0, atol=1e-6)
        assert (values[t + 1] - unchanged[t + 1]).abs() > 1e-3
        torch.testing.assert_close(out.logprobs[0, :t], before.logprobs[0, :t], rtol=0, atol=1e-6)


def test_masked_positions_have_ratio_one_and_no_gradient(world: Path) -> None:
    """The pad's logit is −inf, and a pad stands at every masked position: no NaN may come of it."""
    policy, batch = ending(world), ragged(2)
    out = policy.forward(batch)
    assert (out.logprobs[~batch.mask] == 0).all() and torch.isfinite(out.logprobs).all()
    assert ((out.logprobs - batch.old_logprobs)[~batch.mask].exp() == 1.0).all()
    loss, sums = clipped_policy(out.logprobs, out.logprobs.detach(), torch.randn(batch.mask.shape), batch.mask)
    assert sums["val/ratio"] == batch.mask.sum()
    (loss + out.logprobs.sum() + out.values.sum() + out.after.sum()).backward()
    gradients = [p.grad for p in policy.trainable()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert sum(float(g.abs().sum()) for g in gradients) > 0


def test_the_pads_own_id_changes_nothing(world: Path) -> None:
    policy, batch = ending(world), ragged(1)
    other = replace(
        batch,
        prompt_ids=batch.prompt_ids.masked_fill(~batch.prompt_mask, 77),
        response_ids=batch.response_ids.masked_fill(~batch.mask, 78),
    )
    one, two = policy.forward(batch, entropy=True), policy.forward(other, entropy=True)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("value_model", ["shared", "separate"])
def test_at_the_start_the_reference_is_the_policy_and_values_are_zero(world: Path, rank: int, value_model: str) -> None:
    policy = ending(world, stirred=False, **{"lora.rank": rank, "ppo.value_model": value_model})
    batch = ragged()
    out = policy.forward(batch)
    assert torch.equal(policy.reference_logprobs(batch), out.logprobs.detach())
    assert (out.values == 0).all() and (out.after == 0).all()
    assert policy.value_head.weight.dtype == torch.float32
    assert (policy.value_head.weight == 0).all() and (policy.value_head.bias == 0).all()
    tiny_runs.stir(policy)
    assert (policy.reference_logprobs(batch) - policy.forward(batch).logprobs).abs().max() > 0.01
    assert torch.equal(policy.reference_logprobs(batch), out.logprobs.detach()), "the reference moved"


@pytest.mark.parametrize(
    ("rank", "value_model", "trunks"), [(4, "shared", 1), (4, "separate", 2), (0, "shared", 2), (0, "separate", 3)]
)
def test_the_reference_of_adapters_takes_no_memory(world: Path, rank: int, value_model: str, trunks: int) -> None:
    """Counted twice: transformers alive in this process, and parameter bytes."""
    gc.collect()
    before = {id(o) for o in gc.get_objects() if type(o) is LlamaModel}
    policy = make_policy(tiny_runs.config(world, **{"lora.rank": rank, "ppo.value_model": value_model}))
    gc.collect()
    made = [o for o in gc.get_objects() if type(o) is LlamaModel and id(o) not in before]
    assert len(made) == trunks
    assert (policy.reference is None) == (rank > 0)
    modules = [m for m in (policy.model, policy.value_head, policy.value_trunk, policy.reference) if m is not None]
    parameters = {id(p): p.numel() for module in modules for p in module.parameters()}
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(world / "policy").parameters())
    adapters = sum(p.numel() for p in policy.trainable()) - 33 if rank else 0
    assert sum(parameters.values()) == trunks * base + adapters + 33


def test_separate_values_leave_the_policy_alone_and_shared_ones_do_not(world: Path) -> None:
    for value_model in ("shared", "separate"):
        policy = ending(world, **{"ppo.value_model": value_model})
        policy.forward(ragged()).values.sum().backward()
        touched = [p for p in policy.model.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        assert bool(touched) == (value_model == "shared")
        if policy.value_trunk is not None:
            assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.value_trunk.parameters())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", {"attn.c_attn", "attn.c_proj"}),
        ("llama (grouped queries)", {f"self_attn.{n}_proj" for n in "qkvo"}),
        ("gpt-neox", {"attention.query_key_value", "attention.dense"}),
        ("opt", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"}),
    ],
)
def test_attention_targets_are_every_attention_projection_and_nothing_else(name: str, expected: set[str]) -> None:
    model = tiny_runs.causal(name)
    found = target_names(model, "attention")
    assert {".".join(n.split(".")[-2:]) for n in found} == expected
    assert len(found) == 3 * len(expected) == len(set(found))
    adapted = add_adapter(model, LoraConfig(rank=2))
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(found) and all("lora_" in n for n in trained)


@pytest.mark.parametrize("name", ["gpt2", "llama (grouped queries)"])
def test_adapters_are_float32_over_a_16_bit_base_and_small_updates_do_not_vanish(name: str) -> None:
    base = tiny_runs.causal(name).bfloat16()
    policy = Policy(add_adapter(base, LoraConfig(rank=2)).eval(), tiny.tokenizer(), [0], torch.nn.Linear(32, 1))
    kinds = {p.requires_grad: p.dtype for p in policy.model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    out = policy.forward(small(ragged()))
    assert out.logprobs.dtype == out.values.dtype == torch.float32
    out.logprobs.sum().backward()
    weight = next(p for n, p in policy.model.named_parameters() if "lora_B" in n)
    assert weight.grad.dtype == torch.float32 and weight.grad.abs().sum() > 0
    a = next(p for n, p in policy.model.named_parameters() if "lora_A" in n)
    before = a.detach().clone()
    with torch.no_grad():
        a += 1e-5 * before
    assert not torch.equal(a, before)


def save_causal(name: str, folder: Path) -> Path:
    tiny_runs.causal(name).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["gpt2", "llama (grouped queries)", "gpt-neox"])
@pytest.mark.parametrize("rank", [4, 0])
def test_the_saved_model_is_the_trained_policy(world: Path, tmp_path: Path, name: str, rank: int) -> None:
    folder = save_causal(name, tmp_path / "base")
    policy = ending(world, policy=folder, **{"lora.rank": rank})
    save_policy(policy, str(folder), tmp_path / "final", {"policy": "base"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32).eval()
    batch = small(ragged())
    expected = policy.forward(batch).logprobs
    loaded = replace(policy, model=again, value_head=None)
    torch.testing.assert_close(loaded.forward(batch).logprobs, expected, rtol=0, atol=1e-5)
    assert (policy.reference_logprobs(batch) - expected).abs().max() > 0.01, "the policy did not differ from its start"


def test_adapters_of_a_16_bit_run_are_merged_in_float32(world: Path, tmp_path: Path) -> None:
    policy = ending(world, dtype="bfloat16")
    save_policy(policy, str(world / "policy"), tmp_path / "final", {})
    exact = ending(world)  # the same adapters over the float32 base
    adapters = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for n, p in exact.model.named_parameters():
            if p.requires_grad:
                p.copy_(adapters[n])
    stored = tiny_runs.weights(tmp_path / "final")
    assert {t.dtype for t in stored.values()} == {torch.float32}
    loaded = replace(exact, model=load_causal("x", str(tmp_path / "final"), torch.float32, CPU))
    batch = ragged()
    torch.testing.assert_close(loaded.forward(batch).logprobs, exact.forward(batch).logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_config", [False, True])
def test_a_start_that_is_an_adapter_is_merged_first(world: Path, tmp_path: Path, with_config: bool) -> None:
    first = ending(world)
    first.model.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    if with_config:  # as some trainers leave it beside
        shutil.copy(world / "policy" / "config.json", tmp_path / "adapter")
    second = ending(world, stirred=False, policy=tmp_path / "adapter")
    batch = ragged()
    expected = first.forward(batch).logprobs.detach()
    torch.testing.assert_close(second.reference_logprobs(batch), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(second.forward(batch).logprobs, expected, rtol=0, atol=1e-5)
    tiny_runs.stir(second)
    save_policy(second, locate("policy", str(tmp_path / "adapter")), tmp_path / "final", {})
    loaded = replace(second, model=load_causal("x", str(tmp_path / "final"), torch.float32, CPU))
    torch.testing.assert_close(loaded.forward(batch).logprobs, second.forward(batch).logprobs, rtol=0, atol=1e-5)
