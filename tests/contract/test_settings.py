"""Settings: rules stand at the fields, errors are data, renamed keys are named, and every setting has its help."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, Literal

import pytest

from apportion.cli.arguments import format_help, parse
from apportion.compatibility import check_diagnosis, check_processes
from apportion.config import (
    DemoConfig,
    DiagnoseConfig,
    DPOConfig,
    EvaluateConfig,
    LabelConfig,
    LabelExportConfig,
    LabelImportConfig,
    LabelResultsConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RLConfig,
    SampleConfig,
    Section,
    SFTConfig,
    to_dict,
)
from apportion.config.schema.renamed import check_renamed
from apportion.config.schema.section import rule_of, settings_of
from apportion.errors import ConfigError

LABEL = (LabelConfig, LabelExportConfig, LabelImportConfig, LabelResultsConfig)
TRAINED = (RLConfig, RewardConfig, SFTConfig, DPOConfig)
STAGES = (*TRAINED, EvaluateConfig, DiagnoseConfig, DemoConfig, SampleConfig, *LABEL)


class OtherStage(Section):
    """A stage whose fields have names that other stages use for something else."""

    reward: str = "module:function"
    """a function, where `monitors.reward` is an action."""
    samples: int = 1
    """a count from 1, where `diagnose` needs two."""
    length: int = 10
    """a number, where `monitors.length` is an action."""
    stop: Literal["never", "later"] = "never"
    """words of its own, where `sampling.stop` has others."""
    steps: int = 0
    """a count from 0, where training needs one."""
    clip: float | None = -1.0
    """a number of either sign."""


def refused(make: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        make()
    return caught.value


def test_a_field_of_a_known_name_has_the_rule_of_its_own_section() -> None:
    config = OtherStage(reward="mine:score", samples=1, length=10, stop="never", steps=0, clip=-2.0)
    assert parse(OtherStage, "other", ["--samples", "1", "--reward", "off"]).config.reward == "off"
    assert to_dict(config)["stop"] == "never"
    assert refused(lambda: OtherStage(stop="eos")).expected == "one of never, later"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "field", "got"),
    [
        (lambda: RLConfig(steps=0), "steps", 0),
        (lambda: RLConfig(steps=True), "steps", True),
        (lambda: RLConfig(steps=2.0), "steps", 2.0),
        (lambda: RLConfig(seed=2**31 + 1), "seed", 2**31 + 1),
        (lambda: RLConfig(policy="\t"), "policy", "\t"),
        (lambda: RLConfig(optim={"lr": True}), "optim.lr", True),
        (lambda: RLConfig(optim={"lr": 10**400}), "optim.lr", 10**400),
        (lambda: RLConfig(optim={"lr": float("inf")}), "optim.lr", float("inf")),
        (lambda: RLConfig(sampling={"prompt_tokens": [4, "8"]}), "sampling.prompt_tokens", [4, "8"]),
        (lambda: RLConfig(sampling=5), "sampling", 5),
        (lambda: RLConfig(lora={"targets": []}), "lora.targets", []),
        (lambda: RLConfig(monitors={"ratio": "raise_kl_coef"}), "monitors.ratio", "raise_kl_coef"),
        (lambda: RewardConfig(excerpt_tokens=[9, 8]), "excerpt_tokens", [9, 8]),
        (lambda: DiagnoseConfig(count=1), "count", 1),
    ],
)
def test_a_wrong_value_is_an_error_with_its_parts(make: Any, field: str, got: Any) -> None:
    error = refused(make)
    assert (error.field, error.got) == (field, got)
    assert error.expected and error.fix and "pydantic" not in str(error)


def test_assignment_is_checked_too() -> None:
    config = RLConfig()
    config.steps, config.ppo.epochs, config.optim.lr = 3, 2, 1
    assert (config.steps, config.ppo.epochs, config.optim.lr) == (3, 2, 1.0)
    assert refused(lambda: setattr(config.ppo, "epochs", 0)).field == "epochs"
    error = refused(lambda: setattr(config, "stepz", 3))
    assert error.got == "stepz" and "Did you mean 'steps'" in error.fix
    assert config.ppo.epochs == 2 and not hasattr(config, "stepz")


def test_sections_have_defaults_of_their_own() -> None:
    assert RewardConfig().optim.lr == 1e-3 and OptimConfig().lr == 5e-4
    assert parse(RewardConfig, "reward", ["--optim.eps", "1e-8"]).config.optim.lr == 1e-3
    one, other = RLConfig(), RLConfig()
    one.sampling.prompt_tokens = [1, 2]
    assert other.sampling.prompt_tokens == [4, 8] and one.sampling is not other.sampling
    assert copy.deepcopy(one) == pickle.loads(pickle.dumps(one)) == one != other
    assert one.sampling.max_length == 26
    one.sampling.prompt_tokens = None
    assert one.sampling.max_length == 512 + 24


@pytest.mark.parametrize("word", ["off", "false"])
def test_yaml_reads_off_as_false_and_it_is_off(tmp_path: Path, word: str) -> None:
    (tmp_path / "c.yaml").write_text(f"reward_model: x\nmonitors: {{kl: {word}}}\n")
    assert parse(RLConfig, "rl", ["--config", str(tmp_path / "c.yaml")]).config.monitors.kl == "off"
    assert parse(RLConfig, "rl", ["--reward_model", "x", "--monitors.kl", word]).config.monitors.kl == "off"


RENAMED = [
    (RLConfig, "guards.kl", "tighten", "monitors.kl"),
    (RLConfig, "guards.max_skipped", 5, "monitors.max_skipped"),
    (RewardConfig, "clips", 100, "excerpts"),
    (RewardConfig, "clip_tokens", [8, 64], "excerpt_tokens"),
    (RewardConfig, "probe_clips", 0, "probe_excerpts"),
    (DemoConfig, "clips", 100, "excerpts"),
]


@pytest.mark.parametrize(("kind", "name", "value", "new"), RENAMED)
def test_a_renamed_setting_names_its_new_key(
    tmp_path: Path, kind: type[Section], name: str, value: Any, new: str
) -> None:
    error = refused(lambda: parse(kind, "x", [f"--{name}", str(value)]))
    assert error.field == "flag" and error.expected.startswith(f"--{new}:") and f"Write --{new}" in error.fix
    section, _, key = name.rpartition(".")
    (tmp_path / "c.yaml").write_text(f"{section}: {{{key}: {value}}}\n" if section else f"{key}: {value}\n")
    error = refused(lambda: parse(kind, "x", ["--config", str(tmp_path / "c.yaml")]))
    assert error.field.endswith("c.yaml: key") and error.expected.startswith(new.split(".")[0])
    if value == "tighten":
        assert "Write raise_kl_coef for tighten" in error.fix
        error = refused(lambda: RLConfig(monitors={"kl": "tighten"}))  # type: ignore[arg-type]
        assert error.field == "monitors.kl" and "raise_kl_coef" in error.fix
    error = refused(lambda: check_renamed(["steps", name], "run/config.yaml", "Or start over."))
    assert error.field == "run/config.yaml: key" and new in error.expected
    assert error.fix.endswith("Or start over.")


@pytest.mark.parametrize("kind", [*STAGES, OtherStage])
def test_every_setting_has_its_help(kind: type[Section]) -> None:
    text = "".join(format_help(kind, "x").split())  # it is wrapped, at hyphens too
    for name, field in settings_of(kind).items():
        assert field.description, name
        shown = f"{field.description} ({rule_of(field).expected}; default: "
        assert f"--{name}" in text and "".join(shown.split()) in text, name
    assert f"default:{PPOConfig().value_coef}" in text or kind is not RLConfig


def test_every_process_needs_a_prompt_and_a_rollout() -> None:
    config = RLConfig(sampling={"batch_size": 8, "samples_per_prompt": 4}, ppo={"mini_batch": 2})  # type: ignore[arg-type]
    check_processes(config, 2)
    assert refused(lambda: check_processes(config, 3)).field == "sampling.batch_size"
    config.sampling.samples_per_prompt = 1
    assert refused(lambda: check_processes(config, 3)).field == "ppo.mini_batch"


def test_a_diagnosis_sets_its_rollouts_of_a_prompt_once() -> None:
    config = DiagnoseConfig()
    check_diagnosis(config)
    config.sampling.samples_per_prompt = 4
    assert refused(lambda: check_diagnosis(config)).got == 4


@pytest.mark.parametrize("kind", TRAINED)
def test_every_stage_that_trains_has_the_same_settings_of_services(kind: type[Section]) -> None:
    names = ("trackers", "tracker_project", "push_to_hub", "hub_private", "license")
    fields, of_rl = settings_of(kind), settings_of(RLConfig)
    assert [fields[name].description for name in names] == [of_rl[name].description for name in names]
    config: Any = kind()
    assert (config.trackers, config.push_to_hub, config.hub_private) == ([], None, True)  # nothing leaves the machine
    config = kind(trackers="wandb, tensorboard")  # type: ignore[call-arg]
    assert config.trackers == ["wandb", "tensorboard"]
    assert refused(lambda: kind(trackers=["mlflow"])).field == "trackers"  # type: ignore[call-arg]
    assert refused(lambda: kind(push_to_hub="two words")).field == "push_to_hub"  # type: ignore[call-arg]
