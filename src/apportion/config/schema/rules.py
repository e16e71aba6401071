"""The types of settings: what each accepts, and the words that errors and `--help` use for it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from apportion.config.schema.section import Rule


def _ordered(pair: list[int]) -> list[int]:
    if len(pair) != 2 or not 1 <= pair[0] <= pair[1]:
        raise ValueError("not in order")
    return pair


def _layers(names: Any) -> Any:
    several = listed(names)
    if not isinstance(several, list) or not several or not all(isinstance(name, str) and name for name in several):
        raise ValueError("no names of layers")
    return names


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads `off` as false


def _split(value: Any) -> Any:
    return value.replace(",", " ").split() if isinstance(value, str) else value


def listed(value: Any) -> Any:
    """Return one word as a list of it, for settings that take one or several."""
    return [value] if isinstance(value, str) else value


def _number(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


# numbers; bool is no number, and a whole number written as 2.0 is none either
Count = Annotated[int, Field(ge=1, strict=True), Rule("a whole number >= 1")]
CountOrZero = Annotated[int, Field(ge=0, strict=True), Rule("a whole number >= 0")]
AtLeastTwo = Annotated[int, Field(ge=2, strict=True), Rule("a whole number >= 2")]
Seed = Annotated[int, Field(ge=0, le=2**31, strict=True), Rule("a whole number from 0 to 2^31")]
Positive = Annotated[float, Field(gt=0, strict=True), Rule("a number > 0")]
NotNegative = Annotated[float, Field(ge=0, strict=True), Rule("a number >= 0")]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True), Rule("a number in [0, 1]")]
Finite = Annotated[float, Field(strict=True), Rule("a finite number")]
Seconds = Annotated[float, Field(gt=0, strict=True), Rule("a number of seconds > 0")]

# words
Switch = Annotated[bool, Field(strict=True), Rule("true or false")]
Word = Annotated[str, Field(strict=True), Rule("text")]
Name = Annotated[str, Field(strict=True, pattern=r"\S"), Rule("a name or a path")]
AlgorithmName = Annotated[str, Field(strict=True, pattern=r"\S"), Rule("a name of `apportion algorithms`")]
RewardModelName = Annotated[
    str,
    Field(strict=True, pattern=r"\S"),
    Rule(
        "a folder or hub id of a sequence classifier",
        "Train one with `apportion reward`, then pass --reward_model runs/reward/final.",
    ),
]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]
Action = Annotated[Literal["off", "warn", "stop"], BeforeValidator(_off)]
KLAction = Annotated[Literal["off", "warn", "stop", "raise_kl_coef"], BeforeValidator(_off)]

Label = Annotated[str, BeforeValidator(_number), Field(strict=True, pattern=r"\S"), Rule("a label's name or number")]

# lists and methods
Interval = Annotated[
    list[Annotated[int, Field(strict=True)]],
    AfterValidator(_ordered),
    Rule("[low, high] with 1 <= low <= high", "Example: [4, 8]."),
]
Names = Annotated[list[Name], Rule("a list of names", "Example: [sparse, uniform].")]
Trackers = Annotated[
    list[Literal["tensorboard", "wandb", "trackio"]],
    BeforeValidator(_split),
    Rule("names of trackers: tensorboard, wandb, trackio", "Example: --trackers tensorboard wandb."),
]
RepositoryName = Annotated[
    str, Field(strict=True, pattern=r"^\S+$"), Rule("the name of a repository", "Example: --push_to_hub me/my-model.")
]
Methods = Annotated[list[Any], Rule("a list of methods", "Example: [sparse, {attention: {mix: 0.5}}].")]
Layers = Annotated[
    Any,
    AfterValidator(_layers),
    Rule('"attention", "all", or a list of layer names', "Example: [q_proj, v_proj]."),
]
Variables = Annotated[
    dict[str, Any],
    Rule("a mapping of variables of the chat template", "Example: {enable_thinking: false}."),
]
Spec = Annotated[Any, Rule("a method: a name, {name: {key: value}}, or a list of these", "Example: [attention].")]
Rewards = Annotated[
    Any,
    Rule("a reward, {reward: {key: value}}, or a list of these", "Example: [json, {my_rewards:short: {weight: 0.5}}]."),
]
