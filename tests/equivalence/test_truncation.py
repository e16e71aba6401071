"""Top-k, top-p and min-p: the same tokens as transformers' own processors, and log-probabilities of both kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from apportion.config import SamplingConfig
from apportion.errors import ConfigError
from apportion.generation import sample
from apportion.generation.truncation import Truncation
from apportion.models.policy import frozen_policy
from apportion.models.tokenizers import load_tokenizer

CASES: list[dict[str, Any]] = [
    *({"top_k": k} for k in (1, 3, 50, 400, 1000)),
    *({"top_p": p} for p in (0.01, 0.3, 0.9, 0.999, 1.0)),
    *({"min_p": p} for p in (0.001, 0.1, 0.6, 1.0)),
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 30, "min_p": 0.05},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.1},
]


def theirs(settings: dict[str, Any]) -> LogitsProcessorList:
    found: list[Any] = []
    if "top_k" in settings:
        found.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        found.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        found.append(MinPLogitsWarper(settings["min_p"]))
    return LogitsProcessorList(found)


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_the_tokens_left_are_those_of_transformers(settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (0.3, 2.0, 8.0):
        logits = scale * torch.randn(40, 400, generator=generator, dtype=torch.float64)
        logits[:, :7] = -torch.inf  # banned
        if "top_p" not in settings:  # of equally likely tokens at its edge any may be left out
            logits[5, 20:40] = logits[5, 20]
        ours = Truncation(**settings)(logits)
        assert torch.equal(ours.isfinite(), theirs(settings)(None, logits.clone()).isfinite())  # type: ignore[arg-type]
        in_float32 = Truncation(**settings)(logits.float()).isfinite()
        assert float((in_float32 != ours.isfinite()).float().mean()) < 1e-3
        kept = ours.isfinite()
        assert torch.equal(ours[kept], logits[kept]) and bool(kept.gather(1, logits.argmax(1, keepdim=True)).all())


def test_sets_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = [Truncation(**one)(logits).isfinite()[0].tolist() for one in ({"top_p": 0.6}, {"top_k": 1}, {"min_p": 0.25})]
    assert kept == [[True, True, False, False], [True, False, False, False], [True, True, True, False]]
    both = Truncation(top_k=3, top_p=0.8)(logits)  # of .5263 .3158 .1579 the first two are .8421
    assert both.isfinite()[0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("settings", [{"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}])
def test_values_out_of_range_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Truncation(**settings)


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.8}])
@torch.no_grad()
def test_sampled_log_probabilities_are_those_of_a_forward_of_transformers(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = str(tiny.save_policy(tmp_path / "policy"))
    tokens = load_tokenizer("policy", folder)
    loading: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "pad_token": None}
    policy = frozen_policy("policy", folder, tokens, **loading, stop="eos", temperature=0.7)
    config = SamplingConfig(samples_per_prompt=3, max_new_tokens=9, stop="eos", temperature=0.7, rows=4)
    prompts = [tokens(text)["input_ids"] for text in ("This film", "A lovely little", "No")]
    truncation = Truncation(**settings)
    rollouts = sample(policy, prompts, config, torch.Generator().manual_seed(3), truncation=truncation)
    assert ("sampling_logprobs" in rollouts.evidence) == bool(settings)
    plain = sample(policy, prompts, config, torch.Generator().manual_seed(3))
    assert bool(settings) or torch.equal(plain.logprobs, rollouts.logprobs)
    for i in range(len(rollouts)):
        own, answer = prompts[int(rollouts.group[i])], rollouts.response_ids[i][rollouts.mask[i]]
        logits = policy.model(torch.cat([torch.tensor(own), answer])[None]).logits[0, len(own) - 1 : -1].float() / 0.7
        logits[:, policy.banned] = -torch.inf
        for values, whole in (
            (rollouts.logprobs, logits),
            (rollouts.evidence.get("sampling_logprobs"), theirs(settings)(None, logits.clone())),  # type: ignore[arg-type]
        ):
            if values is not None:
                expected = whole.log_softmax(dim=-1).gather(1, answer[:, None])[:, 0]
                torch.testing.assert_close(values[i][rollouts.mask[i]], expected, atol=1e-3, rtol=0)
