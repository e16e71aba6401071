"""Rows that enter, leave and share prompts against rows written alone: nothing but the speed may change."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import tiny_runs
import torch
import zoo
from transformers.cache_utils import DynamicCache

from apportion.config import SamplingConfig
from apportion.generation import decoding, sample
from apportion.generation.hf_cache import empty_past
from apportion.generation.key_values import KeyValueBuffers, ModelCache
from apportion.generation.llama import LlamaStepModel, is_llama
from apportion.generation.step_model import StepModel
from apportion.models.policy import Policy
from apportion.types import Rollouts

EOS, PAD = tiny_runs.EOS, tiny_runs.PAD
PLAIN = ["gpt2", "mistral (window 4)", "qwen3 (q/k norm)", "opt", "gpt-neox"]
EAGER = ["bloom (alibi)", "gemma2 (soft-cap, window)", "gemma3 (window)", "phi3", "gpt-oss (sinks, window)"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def ending(world: Path) -> Policy:
    """A Llama with stirred adapters that writes EOS often."""
    return tiny_runs.policy(world, policy=world / "ending", **{"sampling.stop": "eos"})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Rows of every prompt forward and of every step."""
    found: dict[str, list[int]] = {"prefill": [], "step": []}
    for kind in (StepModel, LlamaStepModel):
        prefill, step = kind.__dict__.get("prefill"), kind.step

        def counted(self: Any, tokens: Any, positions: Any, step: Any = step) -> Any:
            found["step"].append(len(tokens))
            return step(self, tokens, positions)

        def counted_prefill(self: Any, ids: Any, mask: Any, source: Any, prefill: Any = prefill) -> Any:
            found["prefill"].append(len(ids))
            return prefill(self, ids, mask, source)

        monkeypatch.setattr(kind, "step", counted)
        if prefill is not None:
            monkeypatch.setattr(kind, "prefill", counted_prefill)
    return found


def assert_same(one: Rollouts, two: Rollouts, atol: float = 5e-5) -> None:
    """Check that two batches hold the same rollouts."""
    for name in ("prompt_ids", "prompt_mask", "response_ids", "mask", "group", "ended"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    torch.testing.assert_close(one.logprobs, two.logprobs, rtol=0, atol=atol)


def other(name: str) -> Policy:
    """Return a policy of another architecture whose EOS comes often enough to end rows early."""
    if name in EAGER:
        from transformers import AutoModelForCausalLM

        config = zoo.build(name).config
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter if parameter.dim() == 1 else 0.0))
    else:
        model = tiny_runs.causal(name)
    words = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)
    # 8 ids are left, and they are about equally likely, so that EOS comes often
    return Policy(model, words, [PAD, *range(9, 99)], temperature=6.0 if name in EAGER else 1.0)


@pytest.mark.parametrize("rows", [1, 2, 5, 12])
@pytest.mark.parametrize("copies", [1, 3])
def test_rows_at_a_time_change_nothing(ending: Policy, seen: dict[str, list[int]], rows: int, copies: int) -> None:
    prompts = tiny_runs.prompts(8, longest=9)
    settings: dict[str, Any] = {"stop": "eos", "max_new_tokens": 14, "samples_per_prompt": copies, "seed": 3}
    whole = tiny_runs.sampled(ending, prompts, **settings)
    lengths = whole.mask.sum(dim=1)
    assert lengths.min() == 1 and (lengths == 14).any() and lengths.unique().numel() > 4
    assert len(seen["prefill"]) == 1 and seen["prefill"] == [8], "a prompt was computed more than once"
    seen["step"].clear(), seen["prefill"].clear()
    assert_same(whole, tiny_runs.sampled(ending, prompts, rows=rows, **settings))
    assert max(seen["step"]) <= rows
    if rows >= copies:
        assert sum(seen["prefill"]) == 8, "a prompt was computed more than once"


def test_rows_that_ended_are_filled_again(ending: Policy, seen: dict[str, list[int]]) -> None:
    prompts = tiny_runs.prompts(40, longest=9)
    whole = tiny_runs.sampled(ending, prompts, stop="eos", max_new_tokens=30)
    seen["step"].clear(), seen["prefill"].clear()
    assert_same(whole, tiny_runs.sampled(ending, prompts, stop="eos", max_new_tokens=30, rows=8))
    assert sum(seen["prefill"]) == 40 and len(seen["prefill"]) > 5
    steps, tokens = seen["step"], int((whole.mask.sum(dim=1) - 1).sum())
    assert tokens > 200 and len(steps) < 1.5 * tokens / 8 + 30, "waves of 8 would need more"


def test_rows_that_ended_leave_the_batch(ending: Policy, seen: dict[str, list[int]]) -> None:
    batch = tiny_runs.sampled(ending, tiny_runs.prompts(40), stop="eos", max_new_tokens=14)
    steps = seen["step"]
    assert steps == sorted(steps, reverse=True) and steps[0] <= 40 and steps[-1] < steps[0] - 5
    # one step a token after the first, and at most an eighth of the rows idle
    assert sum(steps) <= int((batch.mask.sum(dim=1) - 1).sum()) * 8 / 7 + 1


@pytest.mark.parametrize("stop", ["length", "eos"])
@pytest.mark.parametrize("name", PLAIN + EAGER)
def test_other_architectures_enter_and_leave_too(name: str, stop: str) -> None:
    """Windows of 4 columns among them, which the responses outgrow; against plain forwards of every row alone."""
    policy = other(name)
    assert not is_llama(policy.model) and isinstance(empty_past(policy.model, 1, 1), KeyValueBuffers)
    policy.banned = policy.banned if stop == "eos" else [*policy.banned, EOS]
    prompts = [[2 + i % 90 for i in row] for row in tiny_runs.prompts(7)]
    settings: dict[str, Any] = {"stop": stop, "max_new_tokens": 9, "samples_per_prompt": 2}
    whole = tiny_runs.sampled(policy, prompts, **settings)
    assert_same(whole, tiny_runs.sampled(policy, prompts, rows=4, **settings))
    lengths = whole.mask.sum(dim=1)
    assert stop == "length" or lengths.unique().numel() > 3
    for row in range(0, 14, 3):
        prompt, ids = tiny_runs.alone(whole, row)
        with torch.no_grad():
            logits = policy.allowed(policy.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1])
        expected = logits.log_softmax(dim=-1)[torch.arange(len(ids)), ids]
        torch.testing.assert_close(whole.logprobs[row, : len(ids)], expected, rtol=0, atol=3e-5)


def test_a_model_with_other_memories_uses_transformers_cache_in_waves() -> None:
    """Convolutions beside attention: their states are no columns."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    sizes = tiny_models.WIDE | tiny_models.SHARED_KEYS | {"full_attn_idxs": [1], "block_auto_adjust_ff_dim": False}
    torch.manual_seed(0)
    model = Lfm2ForCausalLM(Lfm2Config(vocab_size=99, pad_token_id=0, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter if parameter.dim() == 1 else 0.0))
    assert isinstance(empty_past(model, 1, 1), ModelCache)
    policy = Policy(model, SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS), [PAD, *range(9, 99)])
    prompts = [[2 + i % 90 for i in row] for row in tiny_runs.prompts(7)]
    settings: dict[str, Any] = {"stop": "eos", "max_new_tokens": 9, "samples_per_prompt": 2}
    whole = tiny_runs.sampled(policy, prompts, **settings)
    assert whole.mask.sum(dim=1).unique().numel() > 3
    assert_same(whole, tiny_runs.sampled(policy, prompts, rows=4, **settings))
    for row in range(14):
        prompt, ids = tiny_runs.alone(whole, row)
        with torch.no_grad():
            logits = policy.allowed(model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1])
        expected = logits.log_softmax(dim=-1)[torch.arange(len(ids)), ids]
        torch.testing.assert_close(whole.logprobs[row, : len(ids)], expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_llamas_steps_written_out_are_its_own(world: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    policy = tiny_runs.policy(world, **{"lora.rank": rank})
    prompts = tiny_runs.prompts(9)
    assert is_llama(policy.model)
    quick = tiny_runs.sampled(policy, prompts, max_new_tokens=12, samples_per_prompt=2)
    monkeypatch.setattr(decoding, "is_llama", lambda model: False)
    assert_same(quick, tiny_runs.sampled(policy, prompts, max_new_tokens=12, samples_per_prompt=2))


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "lora.rank": 0}])
def test_in_16_bit_recorded_logprobs_are_near_a_full_forwards(
    world: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """bfloat16 weights with float32 adapters or with float32 masters; no further than the model's own steps."""
    policy = tiny_runs.policy(world, **changes)
    assert bool(policy.remainders) == ("lora.rank" in changes)
    gaps = []
    for quick in (True, False):
        monkeypatch.setattr(decoding, "is_llama", lambda model, quick=quick: quick)
        batch = tiny_runs.sampled(policy, tiny_runs.prompts(40), max_new_tokens=12)
        assert batch.logprobs.dtype == torch.float32
        gaps.append((batch.logprobs - policy.forward(batch).logprobs).abs().mean().item())
    assert gaps[0] < 0.05 and gaps[0] < 1.5 * gaps[1] + 1e-3, gaps


def test_llamas_of_other_kinds_are_left_to_transformers(world: Path) -> None:
    policy = tiny_runs.policy(world)
    assert not is_llama(tiny_runs.causal("qwen3 (q/k norm)"))
    policy.model.train()
    assert not is_llama(policy.model)


def test_sampling_leaves_nothing_in_the_graph(world: Path) -> None:
    """Training continues after it: the rollouts are ordinary tensors, the weights as they were."""
    policy = tiny_runs.policy(world)
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    batch = tiny_runs.sampled(policy, tiny_runs.prompts(4))
    assert not batch.logprobs.requires_grad and not batch.logprobs.is_inference()
    assert all(torch.equal(v, before[k]) for k, v in policy.model.state_dict().items())
    policy.forward(batch).logprobs.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.trainable())


def test_buffers_hold_what_rows_have_read_through_any_order_of_events() -> None:
    """Against a list of every row's columns: enter, step and leave at random."""
    generator = torch.Generator().manual_seed(0)

    def number(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    buffers, expected = KeyValueBuffers(6, 12), []
    for _ in range(300):
        event = number(4)
        if event == 0 and len(expected) < 6:
            widths = [1 + number(9) for _ in range(1 + number(2))]
            source = torch.tensor([number(len(widths)) for _ in range(min(2, 6 - len(expected)))])
            cache, wide = DynamicCache(), max(widths) + 1
            new = [torch.randn(len(widths), 2, wide, 3, generator=generator) for _ in range(4)]
            cache.update(new[0], new[1], 0), cache.update(new[2], new[3], 1)
            mask = torch.arange(wide) >= wide - torch.tensor(widths)[:, None]
            buffers.add_rows(cache, mask, source)
            expected += [[t[i, :, mask[i]] for t in new] for i in source.tolist()]
        elif event == 1 and expected and number(3) == 0:
            stay = [i for i in range(len(expected)) if number(2)]
            buffers.keep_rows(torch.tensor(stay, dtype=torch.int64))
            expected = [expected[i] for i in stay]
        elif expected:
            at, new = buffers.next_column(), [torch.randn(len(expected), 2, 3, generator=generator) for _ in range(4)]
            for i, pair in enumerate(buffers.layers):
                for t, buffer in zip(new[2 * i : 2 * i + 2], pair, strict=True):
                    buffer[: len(expected), :, at] = t
            expected = [
                [torch.cat([o, t[i][:, None]], dim=1) for o, t in zip(old, new, strict=True)]
                for i, old in enumerate(expected)
            ]
        assert buffers.rows == len(expected)
        for i, row in enumerate(expected):
            real = buffers.seen[i, : buffers.used]
            flat = [buffer[i, :, : buffers.used][:, real] for pair in buffers.layers for buffer in pair]
            assert all(torch.equal(a, b) for a, b in zip(flat, row, strict=True))
            assert real[-1] and not (real[:-1] & ~real[1:]).any(), "a row's columns do not stand together at the end"


def test_rows_is_checked_with_the_other_settings(world: Path) -> None:
    from apportion.errors import ConfigError

    with pytest.raises(ConfigError, match=r"sampling.rows: got 0; expected a whole number >= 1"):
        tiny_runs.config(world, **{"sampling.rows": 0})
    assert tiny_runs.config(world, **{"sampling.rows": 7}).sampling.rows == 7
    assert SamplingConfig().rows is None


def test_uniforms_are_drawn_before_the_first_token(world: Path) -> None:
    """What the generator gives after sampling does not depend on when rows ended."""
    policy = tiny_runs.policy(world, policy=world / "ending", **{"sampling.stop": "eos"})
    after = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(5)
        tiny_runs.stir(policy, seed=seed)
        sample(policy, tiny_runs.prompts(5), SamplingConfig(stop="eos", max_new_tokens=9), generator)
        after.append(torch.rand(1, generator=generator).item())
    assert after[0] == after[1] == after[2]
