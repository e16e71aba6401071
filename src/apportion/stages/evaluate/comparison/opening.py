"""Opening of a comparison: everything that can be wrong is checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apportion.config import AnswerSampling, EvaluateConfig, to_dict
from apportion.data import Row, read_rows
from apportion.data.bad_rows import BadRows, leaving_out
from apportion.data.prompts import Prompt
from apportion.errors import ConfigError
from apportion.generation.prompts import PromptStream, encode_prompts, load_prompts
from apportion.models.families import check_family
from apportion.models.loading import context_of, embeddings_of, locate
from apportion.models.pretrained import load_settings
from apportion.models.reward.loading import same_vocabulary
from apportion.models.tokenizers import load_tokenizer
from apportion.stages.evaluate.comparison.buckets import Bucket, open_buckets
from apportion.stages.evaluate.comparison.entries import Entry, open_entries
from apportion.stages.evaluate.comparison.given import check_positions, given_answers, read_given
from apportion.stages.evaluate.comparison.measures import Measure, open_measures
from apportion.training.run_folder import RunFolder


@dataclass
class Comparison:
    """What is compared, on what and by what.

    Attributes:
        start, policies: the entries. tokenizer: the start's, in which all answers are counted and scored.
        prompts: as ids of it, with the columns that are needed. contents: as texts or messages, for everyone.
        sampling: of the policies, on the contents as they are. measures: rewards and judges.
        buckets: of the prompts. given: the rows of entries whose answers are given, by name.
        rows: the ids of the prompts in each model's own tokenizer and template, by name.
        foreign: names of the models whose vocabulary is not that of `tokenizer`.
    """

    config: EvaluateConfig
    run: RunFolder
    start: Entry
    policies: list[Entry]
    tokenizer: Any
    prompts: PromptStream
    contents: list[Any]
    sampling: AnswerSampling
    measures: list[Measure]
    buckets: list[Bucket]
    given: Mapping[str, list[Row]]
    rows: Mapping[str, list[list[int]]]
    foreign: frozenset[str]

    @property
    def everyone(self) -> list[Entry]:
        """The start, then the policies."""
        return [self.start, *self.policies]

    def field(self, entry: Entry) -> str:
        """Return the setting that an entry is from."""
        return "start" if entry is self.start else "policies"


def open_comparison(config: EvaluateConfig, run: RunFolder) -> Comparison:
    """Return the comparison; no weights are loaded.

    Raises:
        ConfigError, DataError, ModelError: each names the setting and the fix.
    """
    start, policies = open_entries(config)
    everyone = [start, *policies]
    measures = open_measures(config, everyone)
    reader = next((one for one in everyone if one.is_model), None)
    folder = _named_model(start) if reader is None else reader.folder
    tokenizer = load_tokenizer("start", folder, config.pad_token)
    limits = {"context": None} if reader is None else _limits(reader)
    with leaving_out(run.path, config.skip_bad_rows, "evaluate_bad_rows.jsonl") as bad:
        loaded = _load(config, measures, bad)
        sampling = AnswerSampling(**to_dict(config.sampling))
        if all(isinstance(prompt.content, str) for prompt in loaded):
            sampling.chat_template_kwargs = None
        prompts = encode_prompts(loaded, tokenizer, sampling, config.seed, bad=bad, count=config.count, **limits)
    contents = [_content(prompts, i, tokenizer, sampling) for i in range(len(prompts.rows))]
    cut, sampling.prompt_tokens = sampling.prompt_tokens is not None, None
    used = [Prompt(c, p.where, p.columns) if cut else p for p, c in zip(prompts.prompts, contents, strict=True)]
    if cut:  # what is left is a text that every tokenizer reads in its own way
        prompts = encode_prompts(used, tokenizer, sampling, config.seed, **limits)
    rows, foreign = dict[str, list[list[int]]](), set[str]()
    for one in (one for one in everyone if one.is_model):
        own = load_tokenizer("policies", one.folder, config.pad_token)
        rows[one.name] = encode_prompts(used, own, sampling, config.seed, **_limits(one)).rows
        if not same_vocabulary(own, tokenizer) and not same_vocabulary(tokenizer, own):
            foreign.add(one.name)
    wanted = {"temperature": sampling.temperature}
    given = {one.name: read_given(_field(one, start), one, contents, wanted) for one in everyone if not one.is_model}
    for one in (one for one in everyone if one.name in given and start.is_model):
        answers = given_answers(given[one.name], prompts.rows, tokenizer)
        check_positions(_field(one, start), one, answers, prompts.rows, limits["context"])
    buckets = open_buckets(config.bucket, prompts)
    return Comparison(
        config, run, start, policies, tokenizer, prompts, contents, sampling, measures, buckets, given, rows,
        frozenset(foreign),
    )  # fmt: skip


def _field(entry: Entry, start: Entry) -> str:
    return "start" if entry is start else "policies"


def _limits(entry: Entry) -> dict[str, Any]:
    """Return the context and embeddings of a model, for `encode_prompts`. Raises ModelError for one of no policy."""
    settings = load_settings("policies", entry.folder)
    check_family("policies", entry.folder, settings)
    return {"context": context_of(entry.folder, "policies"), "embeddings": embeddings_of(entry.folder, settings)}


def _named_model(start: Entry) -> str:
    """Return the model that given answers say they are from, whose tokenizer then counts all tokens."""
    named = read_rows(start.folder, ("prompt", "completions"), field="start")[0].get("policy")
    if not isinstance(named, str):
        got, fix = f"{start.given}, whose rows name no policy", "Add --start MODEL, or a model to the policies."
        raise ConfigError("start", got, "a model, whose tokenizer counts the tokens of given answers", fix)
    return locate("start", named)


def _load(config: EvaluateConfig, measures: Sequence[Measure], bad: BadRows | None) -> list[Prompt]:
    """Return the prompts with the columns that rewards, judges and buckets take, which are checked."""
    opened = [one.rewards for one in measures if one.rewards is not None]
    known = [one.wanted for one in opened if one.wanted is not None]
    columns = None if len(known) < len(opened) else frozenset[str]().union(*known)
    if columns is not None and config.bucket is not None:
        columns |= {config.bucket}
    loaded = load_prompts(config.prompts, "evaluate_test", bad, columns, config.split)
    for one in opened:
        one.check_columns([prompt.columns for prompt in loaded])
    return loaded


def _content(prompts: PromptStream, place: int, tokenizer: Any, sampling: AnswerSampling) -> Any:
    """Return a prompt as everyone gets it: its text or messages, or the text that is left of one that is cut."""
    if sampling.prompt_tokens is not None:
        return tokenizer.decode(prompts.rows[place], skip_special_tokens=True)
    given = prompts.prompts[place].content
    return given if isinstance(given, str) else list(given)
