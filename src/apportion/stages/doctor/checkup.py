"""What `apportion doctor` asks of a run, in order: cheap questions first, models loaded once; and the part of it that
`apportion rl` asks itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from apportion.config import LoraConfig, OptimConfig, RewardConfig, RLConfig
from apportion.data import BUILTIN_DATA, labelled
from apportion.data.bad_rows import BadRows
from apportion.errors import ApportionError, ConfigError, DataError, DiskError, ModelError
from apportion.generation.prompts import conversations, encoded, load_prompts
from apportion.models.loading import NO_CODE, context_of, load_settings, locate, read_tokenizer
from apportion.stages.doctor import Case, Check, Finding, examine
from apportion.stages.doctor.checks import machine, method, policy, prompts, reading, reward, tokens
from apportion.stages.doctor.findings import FAIL, OK, WARN, ok, warn
from apportion.stages.reward.train import read_data
from apportion.stages.rl.method import build_method
from apportion.stages.rl.rollout_log import comparisons
from apportion.system import safe_yaml

Said = tuple[str, str, str]


def open_method(case: Case) -> Said:
    """The choices can be built, and go together."""
    case.method = build_method(case.config)
    needs = (compared.needs for compared in comparisons(case.config.compare).values())
    case.notes["needs"] = frozenset(case.method.needs).union(*needs)
    return method.unusual(case)


def open_policy(case: Case) -> Said:
    """The policy's files are there."""
    case.policy_folder = locate("policy", case.config.policy)
    case.policy_settings = load_settings("policy", case.policy_folder)
    case.context = context_of(case.policy_folder)
    case.tokenizer = read_tokenizer("policy", case.policy_folder)
    case.stops = generation_stops(case)
    kind, words = case.policy_settings.model_type, len(case.tokenizer.get_vocab())
    return ok(f"{case.config.policy}: {kind}, context {case.context} tokens, vocabulary {words}")


def generation_stops(case: Case) -> frozenset[int]:
    """Return the ids at which the policy's generation settings, or else its own, end a text.

    Raises:
        ModelError: they cannot be read, or are no ids.
    """
    from transformers import GenerationConfig

    file, expected = "generation_config.json", "settings that transformers can read"
    fix = "Fix it, or delete it where the model's config.json says how a text ends."
    try:
        given = GenerationConfig.from_pretrained(case.policy_folder, **NO_CODE).eos_token_id
    except OSError:  # a folder without one
        file, given = "config.json", getattr(case.policy_settings.get_text_config(), "eos_token_id", None)
    except Exception as error:  # it checks each setting in its own way
        got = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{case.policy_folder}/{file}", got, expected, fix) from error
    ids = [] if given is None else given if isinstance(given, list | tuple) else [given]
    if not all(type(one) is int for one in ids):
        expected = "an id as eos_token_id, or a list of ids"
        raise ModelError(f"{case.policy_folder}/{file}", given, expected, "Fix it there.")
    return frozenset(ids)


def open_reward(case: Case) -> Said:
    """The reward model's files are there, and it has 1 or 2 labels."""
    case.reward_folder = locate("reward_model", case.config.reward_model)
    case.reward_settings = load_settings("reward_model", case.reward_folder)
    case.reward_tokenizer = read_tokenizer("reward_model", case.reward_folder)
    count = case.reward_settings.num_labels
    if count not in (1, 2):
        fix = "Use a reward model (1 label) or a binary classifier (2 labels)."
        return FAIL, f"{case.config.reward_model} with {count} labels", fix
    read_learned(case)
    return ok(f"{case.config.reward_model}: {case.reward_settings.model_type}, {count} labels")


def read_learned(case: Case) -> None:
    """Put the data of the reward model's run folder into the case, where it lies in one and its data can be read.

    A stranger may have written that folder: nothing is fetched that it names, and what is wrong in it becomes a note.
    """
    file = Path(case.reward_folder).parent / "config.yaml"
    if not (Path(case.reward_folder).is_dir() and file.is_file()):
        return
    try:
        stored = safe_yaml.load(file.read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or "excerpts" not in stored:  # of another stage, or no run of ours
            return
        case.training, case.held_out = read_data(learned_from(stored))
    except (ApportionError, yaml.YAMLError, OSError, ValueError, TypeError) as error:  # its data may have moved since
        case.notes["reward_data"] = (str(error).splitlines() or [type(error).__name__])[0]
    case.labelled = case.labelled or case.held_out


def is_here(source: str) -> bool:
    """Whether `source` is a file or folder of this machine; no device, which would have no end."""
    path = os.path.expanduser(source)
    return os.path.isfile(path) or os.path.isdir(path)


def learned_from(stored: dict[str, Any]) -> RewardConfig:
    """Return the settings of a reward model's run. Raises DataError for data that is not here, TypeError, ConfigError
    for settings that cannot be."""
    for name in ("data", "test_data"):
        source = stored.get(name)
        here = isinstance(source, str) and (source in BUILTIN_DATA or is_here(source))
        if source is not None and not here:
            raise DataError(name, source, "a file that is here, or a built-in name", "Nothing else is read.")
    sections: dict[str, Any] = {"lora": LoraConfig, "optim": OptimConfig}
    known = RewardConfig.__dataclass_fields__
    return RewardConfig(**{k: sections[k](**v) if k in sections else v for k, v in stored.items() if k in known})


def open_prompts(case: Case) -> Said:
    """Prompts can be read, and each leaves room for its response in the policy's context."""
    bad = unwritten(case.config)
    case.texts = load_prompts(case.config.prompts, "rl", bad)
    case.rows = encoded(case.texts, case.tokenizer, case.config.sampling, case.config.seed)
    case.notes["conversations"] = conversations(case.texts, case.rows, case.config.sampling)
    if case.evaluation is None and case.config.prompts in BUILTIN_DATA:
        case.evaluation = load_prompts(case.config.prompts, "evaluate_test")
    return left_out(prompts.lengths(case), bad)


def unwritten(config: Any) -> BadRows | None:
    """Return a counter of the rows that `skip_bad_rows` leaves out, which writes nothing; None where it is off."""
    return BadRows(lambda rows: None) if config.skip_bad_rows else None


def left_out(said: Said, bad: BadRows | None) -> Said:
    """Return what a check of data said, or a warning where it said ok of data with rows left out."""
    level, found, fix = said
    if bad is None or not bad.count:
        return said
    found = f"{found}; {bad.count} rows left out (skip_bad_rows)"
    return (level, found, fix) if level != OK else warn(found, "Look at the run's bad_rows.jsonl, or fix the rows.")


def check(name: str, ask: Callable[[Case], Said], *after: str, **more: Any) -> Check:
    """Return the check that `ask` makes; its docstring is what it promises."""
    promise = " ".join((ask.__doc__ or "").split()).rstrip(".")
    return Check(name, promise, ask, after, **more)


CHECKS: tuple[Check, ...] = (
    check("method", open_method, error=ConfigError, opens=True),
    check("processor", machine.processor, error=ConfigError),
    check("policy", open_policy, opens=True),
    check("reward model", open_reward, opens=True),
    check("pad token", tokens.pad_token, "policy"),
    check("prompts", open_prompts, "policy", error=DataError, opens=True),
    check("prompt tokens", tokens.prompt_ids, "prompts", "pad token", error=DataError),
    check("beginning of text", tokens.beginning, "prompts", error=DataError),
    check("chat template", prompts.chat_template, "prompts", error=DataError),
    check("end of text", tokens.stop_tokens, "policy", "pad token"),
    check("vocabulary", tokens.vocabulary, "prompts"),
    check("reward tokenizer", reading.tokenizer, "reward model", "pad token", "prompts"),
    check("duplicates", prompts.duplicates, "prompts", error=DataError),
    check("evaluation prompts", prompts.evaluation, "prompts", error=DataError),
    check("reward data", prompts.reward_data, "reward model", "prompts", error=DataError),
    check("memory", machine.memory, "policy", "prompts", "processor", error=ConfigError, estimate=True),
    check("disk", machine.disk, "policy", error=DiskError),
    check("policy weights", policy.weights, "vocabulary", "pad token", "processor", loads=True),
    check("policy numbers", policy.finite, "policy weights", loads=True),
    check("reward head", reward.head, "reward tokenizer", "processor", loads=True),
    check("reward numbers", reward.finite, "reward head", loads=True),
    check("responses", policy.ends, "policy weights", "method", "prompts", "end of text", loads=True),
    check("likely beginning", policy.begins, "policy weights", "prompts", loads=True),
    check("sampler and trainer", policy.sampler_gap, "responses", loads=True),
    check("policy padding", policy.padding, "policy weights", "prompts", loads=True),
    check("reference", policy.reference, "policy weights", "prompts", loads=True),
    check("reward padding", reward.padding, "reward head", "policy weights", "prompts", loads=True),
    check("attention row", reward.attention, "reward head", "policy weights", "prompts", "method", loads=True),
    check("scores", reward.scores, "reward head", "responses", loads=True),
    check("order of scores", reward.order, "reward head", loads=True),
)
# what `apportion rl` asks beside what it refuses by itself while it opens models and prompts
OWN = ("prompt tokens", "beginning of text", "chat template", "end of text", "vocabulary", "duplicates", "memory")


def checkup(
    config: RLConfig,
    *,
    fast: bool = False,
    threads: Any = None,
    eval_prompts: str | None = None,
    labels: str | None = None,
    tell: Callable[[str], None] = lambda name: None,
) -> list[Finding]:
    """Return what every check finds of a run with these settings; loads its models once, unless `fast`.

    Args:
        threads: what `cpu.configure_threads` returned.
        eval_prompts: prompts of the evaluation to come, as `prompts` takes them.
        labels: labelled texts to test the order of scores on, as `apportion reward --data` takes them.
        tell: called with the name of each check before it is asked.

    Raises:
        DataError: `eval_prompts` or `labels` cannot be read.
    """
    case = Case(config, threads=threads)
    if eval_prompts is not None:
        case.evaluation = load_prompts(eval_prompts, "evaluate_test")
    if labels is not None:
        case.labelled = labelled(labels, field="--labels")
    return examine(case, [one for one in CHECKS if not (fast and one.loads)], tell)


def quick(config: RLConfig, folder: str, tokenizer: Any, texts: Sequence[Any], rows: Sequence[Any]) -> list[Finding]:
    """Return what is worth a warning before a run's models are loaded; draws no random number.

    Args:
        folder: the policy's. tokenizer: the policy's, with its pad token. texts, rows: the prompts and their ids.

    Raises:
        ModelError, DataError: a check failed, as `Check.error` says.
    """
    case = Case(config, policy_folder=folder, tokenizer=tokenizer, texts=texts, rows=rows)
    case.policy_settings, case.context = load_settings("policy", folder), context_of(folder)
    case.stops = generation_stops(case)
    asked = {one.name: one for one in CHECKS if one.name in OWN}
    found = examine(case, asked.values())
    for one in found:
        if one.level == FAIL and not asked[one.name].estimate:
            raise asked[one.name].refusal(one)
    return [one for one in found if one.level in (WARN, FAIL)]


def failed(findings: Sequence[Finding]) -> bool:
    """Whether any check failed."""
    return any(one.level == FAIL for one in findings)
