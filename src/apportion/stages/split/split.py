"""Rankings split by prompt: rankings, demonstrations and prompts to train on, and held-out ones to evaluate with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from apportion.config import to_dict
from apportion.config.chain.split import SplitConfig
from apportion.data.answers.item_id import canonical_json, item_id
from apportion.data.answers.ranking_rows import Ranking
from apportion.data.answers.rankings import read_rankings
from apportion.data.bad_rows import BadRows, leaving_out
from apportion.data.dialogues import dialogue
from apportion.errors import ConfigError, DataError
from apportion.system.progress import activity
from apportion.training.run_folder import RunFolder

RANKINGS, HELD_OUT_RANKINGS = "rankings.jsonl", "held_out_rankings.jsonl"
DEMONSTRATIONS, PROMPTS, HELD_OUT_PROMPTS = "demonstrations.jsonl", "prompts.jsonl", "held_out_prompts.jsonl"


def split_rankings(config: SplitConfig, *, fresh: bool = False) -> RunFolder:
    """Write the files and return the run folder, with their counts in evaluation.json.

    Raises:
        ConfigError: no data. DataError: as `read_rankings`; fewer prompts than are to be held out. DiskError.
    """
    if not config.data:
        fix = "Pass --data rankings.jsonl, for example those of `apportion label export`."
        raise ConfigError("data", config.data, "a file, folder or hub id of rankings or preference pairs", fix)
    run = RunFolder.open(config.output, "split", to_dict(config), fresh=fresh)
    if run.finished:
        return run
    with run.record_failure(), activity("splitting"), leaving_out(run.path, config.skip_bad_rows) as bad:
        files, counts = plan_files(config, bad)
        for name, rows in files.items():
            (run.path / name).unlink(missing_ok=True)  # of an attempt that was killed
            run.logs.append(name, rows)
        run.write_json("evaluation.json", counts)
        run.write_status("finished")
    return run


class Plan(NamedTuple):
    """The rows of each file, and their numbers."""

    files: dict[str, Sequence[dict[str, Any]]]
    counts: dict[str, int]


def plan_files(config: SplitConfig, bad: BadRows | None = None) -> Plan:
    """Return what is to be written; without `bad`, rows that `skip_bad_rows` leaves out are left out unlogged.

    Raises:
        DataError: as `read_rankings`; fewer prompts than are to be held out.
    """
    if bad is None and config.skip_bad_rows:
        bad = BadRows(lambda rows: None)
    everything = [one for source in config.data for one in read(source, config, bad)]
    kept = [one for one in everything if is_short(one, config.longest_prompt)]
    training, held_out = divide(kept, config)
    found, short = ({one.key for one in rows} for rows in (everything, kept))
    files: dict[str, Sequence[dict[str, Any]]] = {
        RANKINGS: [ranking_row(one) for one in training],
        DEMONSTRATIONS: list(demonstrations(training)),
        PROMPTS: prompt_rows(training),
        HELD_OUT_RANKINGS: [ranking_row(one) for one in held_out],
        HELD_OUT_PROMPTS: prompt_rows(held_out),
    }
    counts = {"rankings_read": len(everything), "prompts_read": len(found), "prompts_too_long": len(found - short)}
    return Plan(files, counts | {name.removesuffix(".jsonl"): len(rows) for name, rows in files.items()})


def read(source: str, config: SplitConfig, bad: BadRows | None) -> list[Ranking]:
    """Return the rankings of `source`, with prompts such as "Human: …" as conversations where `dialogues` is set."""
    make: Callable[[Ranking], Ranking] = as_dialogue if config.dialogues else lambda ranking: ranking
    return read_rankings(source, bad=bad, split=config.split, make=make)


def as_dialogue(ranking: Ranking) -> Ranking:
    """Return the ranking with its prompt as a conversation, where it is a dialogue in one text.

    Raises:
        DataError: the dialogue ends with an answer.
    """
    turns = dialogue(ranking.prompt) if isinstance(ranking.prompt, str) else None
    if turns is None:
        return ranking
    if turns[-1]["role"] != "user":
        got = f"{ranking.where}: the last turn of the prompt is the assistant's"
        raise DataError("data", got, "a prompt that ends before the answers", "Move that turn, or leave the row out.")
    completions = tuple(one.strip() if isinstance(one, str) else one for one in ranking.completions)
    return replace(ranking, prompt=turns, completions=completions, item=item_id(turns, completions))


def is_short(ranking: Ranking, longest: int | None) -> bool:
    """Whether the prompt of `ranking` has at most `longest` characters."""
    return longest is None or sum(map(len, contents(ranking.prompt))) <= longest


def contents(prompt: Any) -> list[str]:
    """Return the text of a prompt, or that of each of its turns."""
    if isinstance(prompt, str):
        return [prompt]
    return [one if isinstance(one := turn.get("content"), str) else canonical_json(one) for turn in prompt]


def first_words(prompt: Any) -> str:
    """Return a prompt in text, or its first turn that is no system's: that one may be the same for everyone."""
    if isinstance(prompt, str):
        return prompt
    turns = [turn for turn in prompt if turn.get("role") not in ("system", "developer")]
    return contents(turns or prompt)[0]


def divide(rankings: Sequence[Ranking], config: SplitConfig) -> tuple[list[Ranking], list[Ranking]]:
    """Return (training, held-out) rankings: groups of equal beginnings, by hash, until enough prompts are held out.

    Raises:
        DataError: nothing would be left to train on.
    """
    groups: dict[str, list[Ranking]] = {}
    for one in rankings:
        beginning = " ".join(first_words(one.prompt).lower().split())
        groups.setdefault(hashlib.sha256(f"{config.seed}:{beginning}".encode()).hexdigest(), []).append(one)
    training, held_out = list[Ranking](), list[Ranking]()
    prompts, held = set[str](), set[str]()
    for _, group in sorted(groups.items()):
        if config.count is not None and len(prompts) >= config.count:
            break
        prompts |= {one.key for one in group}
        if len(held) < config.held_out:
            held |= {one.key for one in group}
            held_out += group
        else:
            training += group
    if not training:
        got = f"{len(prompts)} prompts in {len(groups)} groups of equal beginnings, {config.held_out} to hold out"
        raise DataError("data", got, "more prompts than are held out", "Lower --held_out, or give more rankings.")
    return training, held_out


def ranking_row(ranking: Ranking) -> dict[str, Any]:
    """Return the row of a ranking."""
    row = {"item": ranking.item, **prompt_row(ranking), "completions": list(ranking.completions)}
    row |= {"ranks": list(ranking.ranks)}
    optional = {"margins": ranking.margins, "annotator": ranking.annotator, "source": ranking.source}
    return row | {name: value for name, value in optional.items() if value is not None}


def prompt_row(ranking: Ranking) -> dict[str, Any]:
    """Return the row of the prompt of a ranking, with what its chat template is given."""
    row: dict[str, Any] = {"prompt": ranking.prompt}
    if not isinstance(ranking.prompt, str):
        row |= {"tools": ranking.prompt.tools} if ranking.prompt.tools else {}
        row |= {"chat_template_kwargs": ranking.prompt.template_kwargs} if ranking.prompt.template_kwargs else {}
    return row


def prompt_rows(rankings: Sequence[Ranking]) -> list[dict[str, Any]]:
    """Return the different prompts of the rankings, in their order."""
    return list({one.key: prompt_row(one) for one in rankings}.values())


def demonstrations(rankings: Sequence[Ranking]) -> Iterator[dict[str, Any]]:
    """Yield the best answer of each ranking; one that several rankings prefer comes once."""
    seen = set[str]()
    for one in rankings:
        judged = [(rank, place) for place, rank in enumerate(one.ranks) if rank is not None]
        if not judged:
            continue
        best = one.completions[min(judged)[1]]
        name = item_id(one.prompt, [best])
        if name not in seen:
            seen.add(name)
            answer = [{"role": "assistant", "content": best}] if isinstance(best, str) else list(best)
            yield {**prompt_row(one), "completion": best if isinstance(one.prompt, str) else answer}
