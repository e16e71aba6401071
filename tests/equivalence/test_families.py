"""Policies whose past is in no key-value cache: sampled exactly, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_models
import tiny_runs
import torch

from apportion.config.sections import LoraConfig
from apportion.errors import ConfigError, ModelError, ScoreError
from apportion.generation.decoding import KNOWN, Decoding, decoding, tried
from apportion.generation.recompute import RecomputeStepModel
from apportion.generation.step_model import StepModel
from apportion.models.families import REFUSED
from apportion.models.loading import load_causal
from apportion.models.lora import add_adapter, target_names
from apportion.models.policy import Policy

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
KEYS = SIZES | {"num_key_value_heads": 2}
STATES = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
WINDOWED = {"lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3}
EXPERTS = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 4}
EXPERTS["layer_types"] = ["linear_attention", "full_attention"]
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
# name -> (configuration class, settings, the class of its decoding steps)
EXACT: dict[str, tuple[str, dict[str, Any], type[StepModel]]] = {
    "mamba": ("MambaConfig", STATES, RecomputeStepModel),
    "falcon_mamba": ("FalconMambaConfig", STATES, RecomputeStepModel),
    "openai-gpt": ("OpenAIGPTConfig", GPT, RecomputeStepModel),
    "minimax": ("MiniMaxConfig", KEYS | EXPERTS, RecomputeStepModel),
    "gpt-j": ("GPTJConfig", GPT | {"rotary_dim": 8}, StepModel),
}
INEXACT: dict[str, tuple[str, dict[str, Any], str]] = {
    "rwkv": ("RwkvConfig", {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}, "mask"),
    "recurrent_gemma": ("RecurrentGemmaConfig", KEYS | WINDOWED, "padding"),
    "xlnet": ("XLNetConfig", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}, "later tokens"),
    "bert": ("BertConfig", SIZES | {"is_decoder": False}, "changes earlier log-probabilities"),
}


def made(kind: str, settings: dict[str, Any]) -> Any:
    """Return a random causal model in float32, its weights far from flat."""
    import transformers

    config = getattr(transformers, kind)(**tiny_models.COMMON | {"bos_token_id": None, "eos_token_id": 1} | settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
    return model


def policy_of(kind: str, settings: dict[str, Any]) -> Policy:
    """Return it as a policy that samples eight ids, EOS among them."""
    from types import SimpleNamespace

    words = SimpleNamespace(pad_token_id=0, eos_token_id=1)
    return Policy(made(kind, settings), words, [0, *range(9, 99)])


@pytest.mark.parametrize("name", EXACT)
def test_sampler_trainer_and_model_agree(name: str) -> None:
    kind, settings, expected = EXACT[name]
    policy = policy_of(kind, settings)
    prompts = [[2 + i % 90 for i in row] for row in tiny_runs.prompts(5, longest=9)]
    chosen: dict[str, Any] = {"stop": "eos", "max_new_tokens": 8, "samples_per_prompt": 2}
    batch = tiny_runs.sampled(policy, prompts, **chosen)
    found = decoding(policy, policy.model)
    assert found.steps is expected and (found.why_slow is None) == (expected is StepModel)
    trained = policy.forward(batch, values=False).logprobs
    torch.testing.assert_close(batch.logprobs, trained, rtol=0, atol=1e-4)
    with torch.no_grad():
        for row in range(len(batch)):
            prompt, ids = tiny_runs.alone(batch, row)
            logits = policy.allowed(
                policy.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            )
            alone = logits.log_softmax(dim=-1)[torch.arange(len(ids)), ids]
            torch.testing.assert_close(batch.logprobs[row, : len(ids)], alone, rtol=0, atol=1e-4)
    assert batch.mask.sum(dim=1).unique().numel() > 1
    some = tiny_runs.sampled(policy, prompts, rows=3, **chosen)  # rows leave, and others enter
    assert torch.equal(some.response_ids, batch.response_ids)
    torch.testing.assert_close(some.logprobs, batch.logprobs, rtol=0, atol=1e-4)


def test_adapters_of_a_mamba_are_on_layers_that_its_kernels_call() -> None:
    model = made("MambaConfig", STATES)
    names = target_names(model, "all")
    assert names and not any(name.endswith(("out_proj", "conv1d")) for name in names)
    with pytest.raises(ConfigError, match=r"lora\.targets: got \['out_proj'\].*in_proj"):
        target_names(model, ["out_proj"])
    add_adapter(model, LoraConfig(rank=2, targets="all"))  # peft accepts them


@pytest.mark.parametrize("name", INEXACT)
def test_what_cannot_be_sampled_exactly_is_refused_by_name(name: str) -> None:
    kind, settings, why = INEXACT[name]
    with pytest.raises(ModelError, match=why):
        tiny_runs.sampled(policy_of(kind, settings), [[5, 6, 7], [8, 9]])


def failing(policy: Policy, error: Exception, when: Callable[[dict[str, Any]], bool]) -> Policy:
    """Make the policy's model raise `error` in every forward whose keyword arguments are `when`."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if when(kwargs):
            raise error

    policy.model.register_forward_pre_hook(hook, with_kwargs=True)
    return policy


def with_cache(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("past_key_values") is not None


def padded(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("attention_mask") is not None


def test_why_a_cache_is_not_used_is_said() -> None:
    policy = failing(policy_of(*EXACT["gpt-j"][:2]), TypeError("no such cache"), with_cache)
    found = decoding(policy, policy.model)
    assert found.steps is RecomputeStepModel
    assert found.why_slow == "with its cache it is stopped by TypeError: no such cache"


def test_an_error_of_the_model_is_in_the_refusal_and_is_its_cause() -> None:
    policy = failing(policy_of(*EXACT["gpt-j"][:2]), IndexError("no such column"), padded)
    with pytest.raises(ModelError, match="padded texts is stopped by IndexError: no such column") as caught:
        decoding(policy, policy.model)
    assert isinstance(caught.value.__cause__, IndexError)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
        ScoreError("score", 0, "another number", "Change it."),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("when", [with_cache, padded])
def test_errors_that_say_nothing_of_the_model_are_no_trial(error: Exception, when: Any) -> None:
    policy = failing(policy_of(*EXACT["gpt-j"][:2]), error, when)
    with pytest.raises(type(error)) as caught:
        decoding(policy, policy.model)
    assert caught.value is error and policy.decoding == {}


@pytest.mark.parametrize("name", [name for name in INEXACT if name in REFUSED])
def test_a_family_that_the_settings_name_is_refused_before_its_weights_are_read(name: str, tmp_path: Path) -> None:
    import transformers

    kind, settings, _ = INEXACT[name]
    getattr(transformers, kind)(**tiny_models.COMMON | settings).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"of the family {name}"):
        load_causal("policy", str(tmp_path), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("name", ["gpt2", "mistral (window 4)", "qwen3 (q/k norm)", "opt", "gpt-neox"])
def test_families_that_are_not_tried_would_pass(name: str) -> None:
    policy = Policy(tiny_runs.causal(name), tiny.tokenizer(), [0])
    assert type(policy.model).__name__ in KNOWN
    assert tried(policy, policy.model) == Decoding(StepModel) and policy.shares == (name != "mistral (window 4)")
