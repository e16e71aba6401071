"""Ids that end a response, fill masked places, or stand for no token: against a plain loop over the model's logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
from malformed_models import edited
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from apportion.config import EvaluateConfig, SamplingConfig
from apportion.errors import ModelError
from apportion.generation import sample
from apportion.models.policy import Policy
from apportion.models.pretrained import generation_stops
from apportion.models.tokenizers import banned_ids, end_ids, pad_id, policy_ends, unnamed_ids, with_pad
from apportion.stages.evaluate.evaluate import evaluate
from apportion.stages.rl.train import train
from apportion.types import Rollouts

WIDE = 430  # logits of a policy whose tokenizer has 400 tokens


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


def saved(folder: Path, tokenizer: Any, *, rows: int = 400, stops: Any = 1) -> Path:
    """Write a policy with `rows` logits and that tokenizer, whose generation settings stop at `stops`."""
    settings = tiny.config(0)
    settings.vocab_size = rows
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    edited(folder / "generation_config.json", eos_token_id=stops)
    tokenizer.save_pretrained(folder)
    return folder


def bare() -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer without a pad token, as GPT-2's is."""
    return tiny.tokenizer(pad=None)


@torch.no_grad()
def by_hand(policy: Policy, prompt: list[int], uniforms: torch.Tensor, ends: set[int], never: set[int]) -> list[int]:
    """Return a response sampled without padding or a cache: the first id whose cumulative probability exceeds u."""
    ids: list[int] = []
    for u in uniforms.tolist():
        logits = policy.model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].double()
        logits[sorted(never)] = -torch.inf
        ids.append(int((logits.softmax(dim=-1).cumsum(dim=0) > u).int().argmax()))
        if ids[-1] in ends:
            break
    return ids


KINDS = {  # (tokenizer's pad token, --pad_token, ids at which generation stops, stop) -> (ends, ids never sampled)
    "one end": ("<pad>", None, 1, "eos", {1}, {0}),
    "several ends": ("<pad>", None, [1, 7, 9], "eos", {1, 7, 9}, {0}),
    "ends that are no tokens": ("<pad>", None, [1, 9, 7000], "eos", {1, 9}, {0}),
    "several ends, never sampled": ("<pad>", None, [1, 7, 9], "length", set(), {0, 1, 7, 9}),
    "pads with EOS": ("<eos>", None, [1, 7], "eos", {1, 7}, set()),
    "pads with another end": ("<pad>", None, [1, 0], "eos", {0, 1}, set()),
    "no pad token": (None, None, 1, "eos", {1}, set()),
    "EOS as the pad token": (None, "<eos>", 1, "eos", {1}, set()),
    "a new pad token": (None, "[PAD]", 1, "eos", {1}, {400}),
    "a new pad token, fixed length": (None, "[PAD]", 1, "length", set(), {1, 400}),
}


@pytest.mark.parametrize("name", KINDS)
def test_responses_are_those_of_a_plain_loop(world: Path, tmp_path: Path, name: str) -> None:
    pad, given, stops, stop, ends, never = KINDS[name]
    folder = saved(tmp_path / "policy", tiny.tokenizer(pad=pad), stops=stops)
    more = {} if given is None else {"pad_token": given}
    policy = tiny_runs.policy(world, stirred=False, policy=folder, **more, **{"sampling.stop": stop})
    assert set(policy.banned) == never and (stop == "length" or set(policy.ends) == ends)
    narrow = set(range(20, 400)) | never  # few ids are left, so that responses end
    policy.banned = sorted(narrow)
    prompts = tiny_runs.prompts(12, longest=9)
    uniforms = torch.rand(12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    settings = SamplingConfig(stop=stop, max_new_tokens=10)
    batch = sample(policy, prompts, settings, torch.Generator().manual_seed(0), uniforms=uniforms)
    assert batch.ended is not None
    lengths = set()
    for row, prompt in enumerate(prompts):
        expected = by_hand(policy, prompt, uniforms[row], ends, narrow)
        assert batch.response_ids[row][batch.mask[row]].tolist() == expected
        assert bool(batch.ended[row]) == (expected[-1] in ends)
        lengths.add(len(expected))
    assert stop == "length" or len(lengths) > 3
    torch.testing.assert_close(batch.logprobs, policy.forward(batch).logprobs, rtol=0, atol=3e-5)


def filled(batch: Rollouts, fill: int) -> Rollouts:
    """Return the rollouts with `fill` at every masked place."""
    response, prompt = batch.response_ids.masked_fill(~batch.valid, fill), batch.prompt_ids
    return replace(batch, response_ids=response, prompt_ids=prompt.masked_fill(~batch.prompt_mask, fill))


def test_what_fills_masked_places_changes_nothing(world: Path) -> None:
    policy = tiny_runs.policy(world, policy=world / "ending", **{"sampling.stop": "eos"})
    batch = tiny_runs.sampled(policy, tiny_runs.prompts(6), stop="eos", max_new_tokens=9)
    assert (~batch.mask).any() and (~batch.prompt_mask).any()
    results = []
    for fill in (tiny_runs.PAD, tiny_runs.EOS, 37):
        out = policy.forward(filled(batch, fill), entropy=True)
        assert out.values is not None and out.entropy is not None
        parameters = policy.trainable()
        loss = out.logprobs.sum() + out.values.square().sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        results.append([out.logprobs, out.values, out.entropy, *(g for g in gradients if g is not None)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    ends = batch.response_ids.gather(1, (batch.mask.sum(dim=1) - 1)[:, None])[:, 0]
    assert batch.ended is not None and (ends[batch.ended] == tiny_runs.EOS).all(), "EOS is on the mask"


def test_ids_without_a_token_have_no_probability(world: Path, tmp_path: Path) -> None:
    """In the sampler, the trainer, the reference and the entropy: against a softmax over the tokens' logits alone."""
    folder = saved(tmp_path / "wide", tiny.tokenizer(), rows=WIDE)
    policy = tiny_runs.policy(world, policy=folder)
    assert policy.banned == [0, 1, *range(400, WIDE)]
    batch = tiny_runs.sampled(policy, tiny_runs.prompts(40), max_new_tokens=8)
    assert int(batch.response_ids.max()) < 400
    out = policy.forward(batch, entropy=True)
    with torch.no_grad():
        for row in range(3):
            prompt, ids = tiny_runs.alone(batch, row)
            logits = policy.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1, 2:400]
            expected = logits.log_softmax(dim=-1)
            chosen = expected[torch.arange(len(ids)), torch.tensor(ids) - 2]
            for found in (batch.logprobs[row], out.logprobs[row].detach()):
                torch.testing.assert_close(found, chosen, rtol=0, atol=3e-5)
            assert out.entropy is not None
            torch.testing.assert_close(out.entropy[row], -(expected.exp() * expected).sum(dim=-1), rtol=0, atol=1e-4)
    reference = policy.reference_logprobs(batch)
    prompt, ids = tiny_runs.alone(batch, 0)
    with torch.no_grad(), policy.as_reference() as model:
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1, 2:400]
    chosen = logits.log_softmax(dim=-1)[torch.arange(len(ids)), torch.tensor(ids) - 2]
    torch.testing.assert_close(reference[0], chosen, rtol=0, atol=3e-5)
    free = [i for i in range(WIDE) if i not in policy.banned]
    assert torch.isneginf(policy.allowed(torch.zeros(1, WIDE))[0, policy.banned]).all() and len(free) == 398


def test_a_vocabulary_with_holes_names_what_it_has() -> None:
    vocabulary = {"a": 0, "b": 1, "c": 5, "d": 6}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")))
    assert unnamed_ids(made, 9) == [2, 3, 4, 7, 8] and unnamed_ids(made, 2) == []
    made.add_special_tokens({"eos_token": "</s>"})
    eos = made.eos_token_id
    assert eos not in unnamed_ids(made, 20)
    assert end_ids(made, [3, 5, eos]) == (eos, 5)
    assert banned_ids(made, "length", end_ids(made), 9)[0] == eos
    assert pad_id(made) == eos and pad_id(with_pad("policy", made, "b")) == 1


def test_without_any_end_only_fixed_lengths_are_generated() -> None:
    vocabulary = {"a": 0, "b": 1}
    made = with_pad("policy", PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary))), None)
    assert made.pad_token_id is None and pad_id(made) == 0 and banned_ids(made, "length", (), 2) == []
    with pytest.raises(ModelError, match=r"no EOS token.*sampling\.stop length"):
        banned_ids(made, "eos", ())


@pytest.mark.parametrize(
    ("stored", "stops"),
    [
        ({"generation_config.json": {"eos_token_id": [7, 9]}}, {7, 9}),
        ({"generation_config.json": None, "config.json": {"eos_token_id": 5}}, {5}),
        ({"generation_config.json": None, "config.json": {"eos_token_id": None}}, set()),
        ({"generation_config.json": {"eos_token_id": None}}, set()),
    ],
)
def test_ends_come_from_generation_settings_or_else_from_the_models(
    tmp_path: Path, stored: dict[str, Any], stops: set[int]
) -> None:
    """A class's default (Llama's is 2) is in neither."""
    folder = tiny.save_policy(tmp_path / "policy")
    for file, changes in stored.items():
        if changes is None:
            (folder / file).unlink()
        else:
            edited(folder / file, **changes)
    assert generation_stops(str(folder)) == stops
    assert policy_ends(str(folder), tiny.tokenizer(), "eos") == (1, *sorted(stops - {1}))


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_with_a_new_pad_token_can_be_loaded_evaluated_and_resumed(world: Path, tmp_path: Path, rank: int) -> None:
    """The tokenizer, the settings and the embeddings of `final/` agree; the added rows are the mean of the others."""
    folder = saved(tmp_path / "policy", bare())
    chosen: dict[str, Any] = {"policy": folder, "pad_token": "[PAD]", "lora.rank": rank, "checkpoint_every": 1}
    chosen |= {"sampling.stop": "eos", "optim.lr": 0.001}

    def stopped(step: int, steps: int, metrics: Any) -> None:
        raise KeyboardInterrupt

    whole, parts = (tiny_runs.config(world, tmp_path / name, **chosen) for name in ("whole", "parts"))
    train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(parts, on_step=stopped)
    assert not (tmp_path / "parts" / "final").exists()
    train(parts)
    one, two = (tiny_runs.weights(tmp_path / name / "final") for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    final = tmp_path / "whole" / "final"
    tokenizer, model = AutoTokenizer.from_pretrained(final), AutoModelForCausalLM.from_pretrained(final)
    assert tokenizer.pad_token == "[PAD]" and tokenizer.pad_token_id == 400 == model.config.pad_token_id
    assert "[PAD]" in tokenizer.all_special_tokens and tokenizer.eos_token_id == 1
    embeddings = model.get_input_embeddings().weight
    assert model.config.vocab_size == len(embeddings) == 401
    torch.testing.assert_close(embeddings[400], embeddings[:400].mean(dim=0), rtol=0, atol=1e-4 if rank else 1e-2)
    settings = EvaluateConfig(run=str(tmp_path / "whole"), count=3, judge=False, prompts=str(world / "prompts.jsonl"))
    assert evaluate(settings)["prompts"] == 3


def test_runs_of_a_policy_without_a_pad_token(world: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "policy", bare(), rows=WIDE, stops=[1, 7])
    refused = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "num_beams": 1, "early_stopping": True}
    edited(folder / "generation_config.json", **refused)  # transformers would not write such settings itself
    config = tiny_runs.config(world, tmp_path / "run", policy=folder, **{"sampling.stop": "eos", "steps": 1})
    train(config)
    rows = tiny_runs.read_lines(tmp_path / "run" / "rollouts.jsonl")
    assert rows and all(row["ended"] == (row["response_ids"][-1] in (1, 7)) for row in rows)
    assert all(i < 400 for row in rows for i in row["response_ids"])
    assert json.loads((tmp_path / "run" / "final" / "config.json").read_text())["pad_token_id"] == 1
    stored = json.loads((tmp_path / "run" / "final" / "generation_config.json").read_text())
    assert stored["eos_token_id"] == [1, 7] and stored.items() >= refused.items()
