"""Checks of an `apportion rl` run in order, cheap ones first, and the part of them that the run does itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from apportion.config import RewardConfig, RLConfig, reward_path, reward_specs
from apportion.data import BUILTIN_DATA, Layout, labelled, labelled_splits
from apportion.data.bad_rows import BadRows
from apportion.errors import ApportionError, ConfigError, DataError, DiskError
from apportion.evidence.process import prompts_for
from apportion.generation.prompts import encode_prompts, load_prompts
from apportion.models.families import check_family
from apportion.models.loading import context_of, embeddings_of, locate, stored_labels
from apportion.models.pretrained import generation_stops, load_settings, reason
from apportion.models.stored_head import positive_label
from apportion.models.text.labelled import chat_renderer
from apportion.models.tokenizers import read_tokenizer
from apportion.rewards import open_rewards
from apportion.stages.doctor import Case, Check, Finding, run_checks
from apportion.stages.doctor.checks import machine, method, policy, prompts, reward, reward_tokenizer, tokens
from apportion.stages.doctor.findings import FAIL, OK, WARN, Result, combine, ok, skip, warn
from apportion.stages.method import build_method, comparisons
from apportion.system import safe_yaml


def open_method(case: Case) -> Result:
    """The method can be built, and its parts are compatible."""
    case.method = build_method(case.config)
    lines: list[str] = []
    compared = comparisons(case.config.compare, lines.append)
    case.notes["needs"] = frozenset(case.method.needs).union(*(one.needs for one in compared.values()))
    result = method.unusual(case)
    left_out = [warn(line.removeprefix("warning: "), "Leave it out of compare.") for line in lines]
    return combine(result, *left_out) if left_out else result


def open_policy(case: Case) -> Result:
    """The policy's files exist."""
    case.policy_folder = locate("policy", case.config.policy)
    case.policy_settings = load_settings("policy", case.policy_folder)
    case.context = context_of(case.policy_folder)
    check_family("policy", case.policy_folder, case.policy_settings)
    case.tokenizer = read_tokenizer("policy", case.policy_folder)
    case.stops = generation_stops(case.policy_folder)
    kind, words = case.policy_settings.model_type, len(case.tokenizer.get_vocab())
    return ok(f"{case.config.policy}: {kind}, context {case.context} tokens, vocabulary {words}")


def open_reward(case: Case) -> Result:
    """The reward model's files exist, and its stored head has 1 or 2 labels, of which one is the good one."""
    path = reward_path(case.config)
    if path is None:
        return skip("no reward is a reward model")
    case.reward_folder = locate("reward_model", path)
    case.reward_settings = load_settings("reward_model", case.reward_folder)
    case.reward_tokenizer = read_tokenizer("reward_model", case.reward_folder)
    count = stored_labels("reward_model", case.reward_folder, download=False)
    names = case.reward_settings.id2label if case.reward_settings.num_labels == count else None
    _, convention = positive_label("reward_model", names, count, case.config.positive_label)
    load_reward_data(case)
    message = f"{path}: {case.reward_settings.model_type}, {count} labels"
    if convention is not None and not case.labelled:  # else the order of its scores decides
        return warn(
            f"{message}; {convention}", "Or pass labelled texts with --labels to check the order of its scores."
        )
    return ok(message)


def load_reward_data(case: Case) -> None:
    """Load the data that the reward model was trained on into the case, where it is in a run folder.

    The folder is untrusted input: nothing that it names is downloaded, and errors in it become a note.
    """
    file = Path(case.reward_folder).parent / "config.yaml"
    if not (Path(case.reward_folder).is_dir() and file.is_file()):
        return
    try:
        stored = safe_yaml.load(file.read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or "excerpts" not in stored:  # another stage, or no run folder
            return
        config = stored_reward_config(stored)
        case.training, case.held_out = labelled_splits(
            config.data,
            config.test_data,
            config.test_texts,
            layout=Layout.of(config),
            render=chat_renderer(lambda: case.reward_tokenizer),
        )
    except (ApportionError, yaml.YAMLError, OSError, ValueError, TypeError) as error:  # the data may have moved
        case.notes["reward_data"] = reason(error)
    case.labelled = case.labelled or case.held_out


def is_local(source: str) -> bool:
    """Whether `source` is a file or folder on this machine, and not a device, which may be endless."""
    path = os.path.expanduser(source)
    return os.path.isfile(path) or os.path.isdir(path)


def stored_reward_config(stored: dict[str, Any]) -> RewardConfig:
    """Return the settings of a reward model's run. Raises DataError for data that is not on this machine, and TypeError
    or ConfigError for invalid settings."""
    for name in ("data", "test_data"):
        source = stored.get(name)
        local = isinstance(source, str) and (source in BUILTIN_DATA or is_local(source))
        if source is not None and not local:
            raise DataError(name, source, "a local file, or a built-in name", "Nothing else is read.")
    return RewardConfig(**{key: value for key, value in stored.items() if key in RewardConfig.model_fields})


def open_prompts(case: Case) -> Result:
    """Prompts can be read, the chat template shows all of each, and each leaves room for its response."""
    bad, config = bad_row_counter(case.config), case.config
    needs = case.method.needs if case.method is not None else ()
    rewards = open_rewards(reward_specs(config.reward_model, config.rewards))
    loaded = prompts_for(needs, config.prompts, bad, config.split, rewards=rewards)
    # without a context every prompt stays, for the checks to count what is wrong
    context = None if bad is None else case.context
    embeddings = embeddings_of(case.policy_folder, case.policy_settings)
    found = encode_prompts(loaded, case.tokenizer, config.sampling, config.seed, context, bad, embeddings=embeddings)
    case.texts, case.rows = found.texts, found.rows
    case.notes |= {"conversations": found.conversations, "hidden": found.hidden}
    if case.evaluation is None and config.prompts in BUILTIN_DATA:
        case.evaluation = contents(config.prompts)
    return with_bad_rows(prompts.lengths(case), bad)


def contents(source: str) -> list[Any]:
    """Return the prompts of an evaluation: texts, or lists of {role, content}."""
    return [prompt.content for prompt in load_prompts(source, "evaluate_test")]


def bad_row_counter(config: Any) -> BadRows | None:
    """Return a counter of the rows that `skip_bad_rows` skips, which writes no file; None where the setting is off."""
    return BadRows(lambda rows: None) if config.skip_bad_rows else None


def with_bad_rows(result: Result, bad: BadRows | None) -> Result:
    """Return a result with the number of skipped rows added; ok becomes a warning where there are any."""
    if bad is None or not bad.count:
        return result
    message = f"{result.message}; {bad.count} rows skipped (skip_bad_rows)"
    if result.level == OK:
        return warn(message, "Look at the run's bad_rows.jsonl, or fix the rows.")
    return result._replace(message=message)


def check(name: str, function: Callable[[Case], Result], *after: str, **flags: Any) -> Check:
    """Return `function` as a check; its docstring says what is expected."""
    expected = " ".join((function.__doc__ or "").split()).rstrip(".")
    return Check(name, expected, function, after, **flags)


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
    check("reward tokenizer", reward_tokenizer.tokenizer, "reward model", "pad token", "prompts"),
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
    check("scores", reward.score_spread, "reward head", "responses", loads=True),
    check("order of scores", reward.order, "reward head", loads=True),
)
# the checks of `apportion rl` itself, in addition to the errors of opening models and prompts
PREFLIGHT = ("prompt tokens", "beginning of text", "chat template", "end of text", "vocabulary", "duplicates", "memory")


def check_rl(
    config: RLConfig,
    *,
    fast: bool = False,
    threads: Any = None,
    eval_prompts: str | None = None,
    labels: str | None = None,
    on_check: Callable[[str], None] = lambda name: None,
) -> list[Finding]:
    """Return the findings of all checks for a run with these settings; loads its models once, unless `fast`.

    Args:
        threads: the result of `cpu.configure_threads`.
        eval_prompts: prompts of the later evaluation, in the form of `prompts`.
        labels: labelled texts to test the order of scores on, in the form of `apportion reward --data`.
        on_check: called with the name of each check before it runs.

    Raises:
        DataError: `eval_prompts` or `labels` cannot be read.
        ModelError: `labels` are conversations, and the reward model's tokenizer cannot be read.
    """
    case = Case(config, threads=threads)
    if eval_prompts is not None:
        case.evaluation = contents(eval_prompts)
    if labels is not None:
        name = reward_path(config)
        if name is None:
            fix = "Leave --labels out, or add a reward model to rewards."
            raise ConfigError("--labels", labels, "a run with a reward model, whose scores it checks", fix)
        render = chat_renderer(lambda: read_tokenizer("reward_model", locate("reward_model", name)))
        case.labelled = labelled(labels, field="--labels", render=render)
    return run_checks(case, [one for one in CHECKS if not (fast and one.loads)], on_check)


def preflight(
    config: RLConfig,
    folder: str,
    tokenizer: Any,
    texts: Sequence[Any],
    rows: Sequence[Any],
    hidden: Sequence[str] = (),
) -> list[Finding]:
    """Return the warnings of a run before its models are loaded; uses no random numbers.

    Args:
        folder: the policy's. tokenizer: the policy's, with its pad token. texts, rows: the prompts and their ids.
        hidden: arguments of tool calls that the chat template leaves out.

    Raises:
        ModelError, DataError: a check failed (`Check.error`).
    """
    case = Case(config, policy_folder=folder, tokenizer=tokenizer, texts=texts, rows=rows, notes={"hidden": hidden})
    case.policy_settings, case.context = load_settings("policy", folder), context_of(folder)
    case.stops = generation_stops(folder)
    checks = {one.name: one for one in CHECKS if one.name in PREFLIGHT}
    findings = run_checks(case, checks.values())
    for one in findings:
        if one.level == FAIL and not checks[one.name].estimate:
            raise checks[one.name].to_error(one)
    return [one for one in findings if one.level in (WARN, FAIL)]


def failed(findings: Sequence[Finding]) -> bool:
    """Whether any check failed."""
    return any(one.level == FAIL for one in findings)
