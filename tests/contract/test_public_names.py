"""The public names that others build on: signatures, defaults, fields, and errors that name the field."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import pickle
import subprocess
import sys

import helpers
import pytest
import torch

import apportion
from apportion import Credit, Rollouts, advantages, credit, losses, segments
from apportion.errors import ConfigError, DataError, DiskError, from_data

# as the design writes them; "*" starts keyword-only parameters. Those that do not exist yet are checked once they do
SIGNATURES = {
    "credit": {
        "sparse": "()",
        "uniform": "(*, mix=1.0)",
        "attention": (
            "(*, mix=0.8, floor=0.0, cap=None, exclude_self=False, layers='last', heads='mean', rollout=False)"
        ),
        "policy_attention": "(*, mix=0.8, view='mean', shifted=False)",
        "kl_penalty": "(*, coef=0.05, target=None, horizon=10000)",
        "implicit": "(*, coef=0.05, clip=0.05, model=None)",
        "attribution": "(*, mix=0.8, signed=True)",
        "shapley": "(*, mix=1.0, spans='sentences', budget=64, seed=0)",
        "process": "(*, function=None, unit='token', keep=False, causal=True)",
        "length_penalty": "(*, coef=0.01, target=0, limit=None)",
        "prefix_difference": "(*, mix=1.0, initial='first')",
    },
    "segments": {
        "tokens": "()",
        "turns": "()",
        "ngrams": "(n=5, *, reproduce=None)",
        "random_ngrams": "(lengths=(2, 3, 5, 10), seed=0)",
        "parsed": "(max_tokens=5)",
        "perplexity": "()",
        "entropy": "(threshold=1.75)",
        "sentences": "()",
        "whole_response": "()",
    },
    "advantages": {
        "gae": "(gamma=1.0, lam=0.95, pooling='first', *, reproduce=None)",
        "group_relative": "(std=True, credit_mix=0.0, cap=3.0)",
        "leave_one_out": "(credit_mix=0.0, cap=3.0)",
        "monte_carlo": "(gamma=1.0)",
        "reinforce_pp": "(baseline=None, gamma=1.0)",
        "vine": "(samples=9)",
    },
}
FOLDERS = {"credit": credit, "segments": segments, "advantages": advantages}
EXISTING = [(folder, name) for folder, module in FOLDERS.items() for name in module.names()]
NEEDS = {
    "sparse": set(),
    "uniform": set(),
    "attention": {"reward_attention"},
    "policy_attention": {"policy_attention_mean"},
    "kl_penalty": {"reference_logprobs"},
    "prefix_difference": {"prefix_scores"},
    "attribution": {"reward_attribution"},
    "process": {"process_rewards"},
    "length_penalty": set(),
    "implicit": {"implicit_logprobs", "reference_logprobs"},
    "tokens": set(),
    "turns": set(),
    "ngrams": set(),
    "random_ngrams": set(),
    "whole_response": set(),
    "perplexity": {"reference_logprobs"},
    "entropy": {"entropy"},
    "sentences": {"sentence_boundaries"},
    "parsed": {"phrase_boundaries"},
    "gae": {"values"},
    "group_relative": set(),
    "leave_one_out": set(),
    "monte_carlo": set(),
    "reinforce_pp": set(),
    "vine": {"vine_values"},
}


def bare(function: object) -> str:
    """Return a signature as text, without annotations."""
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    parameters = [p.replace(annotation=empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize(("folder", "name"), EXISTING)
def test_signatures_are_the_designs(folder, name):
    assert name in SIGNATURES[folder], "a public name that the design does not list"
    expected = SIGNATURES[folder][name]
    if expected is not None:
        assert bare(FOLDERS[folder].find(name)) == expected


def test_these_exist_from_the_first_version():
    assert {"sparse", "uniform", "attention", "policy_attention", "kl_penalty"} <= set(credit.names())
    assert "tokens" in segments.names() and "gae" in advantages.names()


@pytest.mark.parametrize(("folder", "name"), EXISTING)
def test_factories_are_callable_without_arguments_and_state_what_they_need(folder, name):
    factory = FOLDERS[folder].find(name)
    assert getattr(FOLDERS[folder], name) is factory and callable(factory)
    made = factory()
    assert isinstance(made.needs, frozenset)
    if name in NEEDS:
        assert made.needs == NEEDS[name]
    if folder == "credit":
        assert isinstance(made, Credit) and isinstance(made.keeps_return, bool) and isinstance(made.causal, bool)
        assert made.init() is not made.init() or not made.init()
        assert all(isinstance(v, torch.Tensor) for v in made.init().values())


def test_chain_and_apply():
    assert bare(credit.chain) == "(*credits, allow_redistributing_penalties=False)"
    assert bare(credit.apply) == "(credit, rollouts, state=None)"


def test_losses_on_rankings():
    expected = "(scores, groups, ranks, *, margins=None, ties='skip', weight='prompt')"
    assert {name: bare(loss) for name, loss in losses.PREFERENCES.items()} == {
        "bradley_terry": expected,
        "plackett_luce": expected,
    }
    assert all(getattr(losses, name) is loss for name, loss in losses.PREFERENCES.items())


def test_the_flags_of_the_built_in_credits():
    flags = {
        n: (m.keeps_return, m.causal, m.share is not None)
        for n in NEEDS
        if n in credit.names()
        for m in [credit.find(n)()]
    }
    assert flags == {
        "sparse": (True, True, False),
        "uniform": (True, False, True),
        "attention": (True, False, True),
        "policy_attention": (True, False, True),
        "kl_penalty": (False, True, False),
        "prefix_difference": (True, True, False),
        "attribution": (True, False, False),
        "process": (False, True, False),
        "length_penalty": (False, True, False),
        "implicit": (False, True, False),
    }
    assert credit.policy_attention(view="last").needs == {"policy_attention_last"}


def test_importing_a_methods_module_does_not_hide_its_factory():
    for folder, name in EXISTING:
        importlib.import_module(f"apportion.{folder}")
        for module in list(sys.modules):
            if module.startswith(f"apportion.{folder}."):
                importlib.import_module(module)
        assert inspect.isfunction(getattr(FOLDERS[folder], name))
    assert {"Rollouts", "credit", "segments", "advantages"} <= set(apportion.__all__) == set(dir(apportion))
    assert all(hasattr(apportion, name) for name in apportion.__all__) and not hasattr(apportion, "absent")


def test_the_pure_core_imports_no_transformers():
    heavy = ("transformers", "trl", "peft")
    code = f"import sys; from apportion import *; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_data_readers_import_neither_torch_nor_a_model_library():
    heavy = ("torch", "transformers", "trl", "peft", "datasets")
    code = f"import sys, apportion.data, apportion.data.answers; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_names_get_suggestions_and_any_function_can_be_named():
    with pytest.raises(ConfigError, match="attention") as caught:
        credit.find("atention")
    assert "Did you mean" in str(caught.value)
    assert credit.find("apportion.credit.uniform:uniform") is credit.uniform
    for name in ("no_such_package:f", "apportion.credit.uniform:no_such", "apportion.types:State:x", ":"):
        with pytest.raises(ConfigError):
            credit.find(name)
    for module in (segments, advantages):
        with pytest.raises(ConfigError):
            module.find("nothing_like_this")


FIELDS = {  # name -> whether it has a default
    "prompt_ids": False,
    "prompt_mask": False,
    "response_ids": False,
    "mask": False,
    "logprobs": False,
    "scores": None,
    "group": False,
    "evidence": True,
    "valid": True,
    "ended": True,
    "turn": True,
    "policy_version": True,
    "old_logprobs": True,
}


def test_rollouts_fields():
    found = {f.name: f for f in dataclasses.fields(Rollouts)}
    assert set(found) == set(FIELDS)
    missing = dataclasses.MISSING
    for name, has_default in FIELDS.items():
        if has_default is not None:
            own = found[name].default is not missing or found[name].default_factory is not missing
            assert own == has_default, name
    assert all(f.kw_only for f in found.values()) and Rollouts.__dataclass_params__.frozen
    assert not Rollouts.__dataclass_params__.eq


def test_rollouts_defaults():
    rollouts = helpers.rollouts(helpers.bools([[1, 0, 1]]), dirty=False)
    least = {name: getattr(rollouts, name) for name, has_default in FIELDS.items() if not has_default}
    rollouts = Rollouts(**least)
    assert rollouts.valid is rollouts.mask and rollouts.old_logprobs is rollouts.logprobs
    assert (rollouts.ended, rollouts.turn, rollouts.policy_version) == (None, None, None)
    assert rollouts.evidence == {} and len(rollouts) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        rollouts.scores = None


WRONG = {
    "prompt_ids": [torch.zeros(3, 4).long(), torch.zeros(2).long(), torch.zeros(2, 4, 1).long()],
    "prompt_mask": [torch.ones(2, 5).bool(), torch.ones(2).bool()],
    "response_ids": [torch.zeros(2, 4).long(), torch.zeros(2).long()],
    "mask": [torch.ones(2, 3), torch.ones(3).bool(), torch.ones(2, 3, 1).bool()],
    "logprobs": [torch.zeros(3, 2), torch.zeros(2)],
    "old_logprobs": [torch.zeros(2, 4)],
    "valid": [torch.ones(2, 4).bool()],
    "scores": [torch.zeros(2, 3), torch.zeros(3), torch.zeros(())],
    "group": [torch.zeros(2, 1).long(), torch.zeros(3).long()],
    "ended": [torch.ones(3).bool()],
    "turn": [torch.zeros(2).long()],
    "policy_version": [torch.zeros(1).long()],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, v) for n, vs in WRONG.items() for v in vs],
    ids=[f"{n}-{tuple(v.shape)}" for n, vs in WRONG.items() for v in vs],
)
def test_a_wrong_shape_names_the_field_the_value_and_what_was_expected(name, value):
    rollouts = helpers.rollouts(helpers.bools([[1, 1, 0], [1, 0, 0]]), prompt=4, dirty=False)
    values = {f.name: getattr(rollouts, f.name) for f in dataclasses.fields(Rollouts)}
    with pytest.raises(DataError) as caught:
        Rollouts(**values | {name: value})
    text = str(caught.value)
    # another field may be the one that no longer fits: ids and mask of a prompt fix each other, and mask fixes B and T
    assert f"Rollouts.{name}" in text or (name in ("mask", "prompt_ids") and "Rollouts." in text), text
    assert "expected" in text


def test_prompts_of_one_dimension_are_refused():
    rollouts = helpers.rollouts(helpers.bools([[1, 1, 0], [1, 0, 0]]), dirty=False)
    with pytest.raises(DataError, match="prompt_ids"):
        dataclasses.replace(rollouts, prompt_ids=torch.zeros(2).long(), prompt_mask=torch.ones(2).bool())


@pytest.mark.parametrize("shape", [(), (3,), (3, 2), (2, 2), (2, 4), (1, 3), (2, 3, 2, 2)])
def test_evidence_of_a_wrong_shape_is_named(shape):
    with pytest.raises(DataError, match="shiny"):
        helpers.rollouts(helpers.bools([[1, 1, 0], [1, 0, 0]]), dirty=False).with_evidence(shiny=torch.zeros(shape))


def test_evidence_of_the_three_shapes_is_taken_and_travels_with_its_rows():
    rollouts = helpers.rollouts(helpers.bools([[1, 1, 0], [1, 0, 0]]), dirty=False)
    more = rollouts.with_evidence(a=torch.tensor([1.0, 2]), b=torch.arange(6).reshape(2, 3), c=torch.zeros(2, 3, 5))
    assert rollouts.evidence == {} and set(more.evidence) == {"a", "b", "c"}
    again = more.with_evidence(a=torch.tensor([3.0, 4]))
    assert set(again.evidence) == {"a", "b", "c"} and more.evidence["a"].tolist() == [1, 2]
    for rows in (torch.tensor([1]), torch.tensor([False, True])):
        one = more.select(rows)
        assert len(one) == 1 and one.evidence["a"].tolist() == [2] and one.evidence["b"].tolist() == [[3, 4, 5]]
        assert torch.equal(one.prompt_ids, rollouts.prompt_ids[1:]) and torch.equal(one.mask, rollouts.mask[1:])
        assert torch.equal(one.scores, rollouts.scores[1:]) and one.ended is None


class OwnError(ConfigError):
    """A user's error that makes itself in its own way."""

    def __init__(self, code: int) -> None:
        Exception.__init__(self, f"code {code}")


def test_errors_keep_their_parts_through_pickle_and_from_other_processes():
    plain, parts = ConfigError("just text"), DataError("score", 3.5, "a number", "Fix it.", row=2)
    for error in (plain, parts, DiskError("output", "full", "space", "Free some."), DiskError("text")):
        for copied in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
            assert type(copied) is type(error) and str(copied) == str(error)
    relayed = from_data(parts.to_data(), 1)
    assert str(relayed) == f"process 1: {parts}" and (relayed.field, relayed.row, relayed.fix) == (
        "score",
        2,
        "Fix it.",
    )
    own = OwnError(7)
    assert str(own) == "code 7" and own.saved == "" and own.row is None
    assert str(from_data(own.to_data(), 2)) == "process 2: code 7" and str(ConfigError()) == ""
