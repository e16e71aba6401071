"""Answers to prompts: K a prompt with their log-probabilities, each prompt computed once, a row a prompt.

prompts -> ids -> answers, a few prompts at a time -> rows, appended durably
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from apportion.config import SampleConfig, to_dict
from apportion.data.answers.item_id import item_id
from apportion.data.bad_rows import leaving_out
from apportion.data.conversations import Conversation
from apportion.errors import Interrupted
from apportion.generation import sample
from apportion.generation.prompts import PromptStream, encode_prompts, load_prompts
from apportion.generation.sampler import draw_uniforms
from apportion.generation.truncation import Truncation
from apportion.intervals import mean_interval, proportion
from apportion.models.families import check_family
from apportion.models.loading import context_of, embeddings_of, locate, pick_device, pick_dtype
from apportion.models.policy import Policy, frozen_policy
from apportion.models.pretrained import load_settings
from apportion.models.text.render import check_embeddings
from apportion.models.tokenizers import load_tokenizer
from apportion.stages.sample.rows import FLOATS, LINES, PARQUET, SampleFile, to_parquet
from apportion.system.progress import activity
from apportion.training.reproducibility import configure_threads, deterministic_kernels
from apportion.training.run_folder import RunFolder
from apportion.training.session import ProgressCallback
from apportion.training.signals import Signals
from apportion.types import Rollouts

SEED_STEP = 1_000_003  # a prompt's seed is the run's times this, and its place


def sample_answers(
    config: SampleConfig, *, fresh: bool = False, on_step: ProgressCallback = lambda step, steps, metrics: None
) -> Path:
    """Write `sampling.samples_per_prompt` answers to each prompt and return the finished file.

    A killed run resumes after its last whole row: no prompt is lost or answered twice, and the answers are those of an
    uninterrupted run.

    Args:
        on_step: called after each batch with (prompts done, prompts, {}).

    Raises:
        ConfigError, ModelError, DataError, DiskError: each names the fix.
        Interrupted: a signal came; all finished batches are in the file.
    """
    device = pick_device(config.device)
    run = RunFolder.open(config.output, "sample", to_dict(config), fresh=fresh)
    if run.finished:
        return run.path / (PARQUET if config.format == "parquet" else LINES)
    with run.record_failure(), Signals(run.warn) as signals, deterministic_kernels(device):
        run.disk_wait, run.stop_waiting = config.disk_wait, lambda: bool(signals)
        run.update_status(threads=configure_threads(run, config.threads))
        with activity("loading"):
            prompts, policy = _prepare(run, config, device)
        contents = [_content(prompts, i, policy, config) for i in range(len(prompts.rows))]
        file = SampleFile(run, contents)
        _generate(file, prompts, contents, policy, config, signals, on_step)
        figures = _figures(file)
        path = to_parquet(file.path, run.retry_when_full) if config.format == "parquet" else file.path
        run.write_json("evaluation.json", figures)
        run.write_status("finished", prompts=file.count)
    return path


def _prepare(run: RunFolder, config: SampleConfig, device: torch.device) -> tuple[PromptStream, Policy]:
    """Return the prompts as ids and the policy. Cheap checks come before the model."""
    sampling = config.sampling
    with leaving_out(run.path, config.skip_bad_rows) as bad:
        loaded = load_prompts(config.prompts, "rl", bad, split=config.split)
        folder = locate("policy", config.policy)
        settings = load_settings("policy", folder)
        check_family("policy", folder, settings)
        tokenizer = load_tokenizer("policy", folder, config.pad_token)
        limits: dict[str, Any] = {"context": context_of(folder), "embeddings": embeddings_of(folder, settings)}
        prompts = encode_prompts(loaded, tokenizer, sampling, config.seed, bad=bad, count=config.count, **limits)
    loading: dict[str, Any] = {"dtype": pick_dtype(config.dtype, device), "device": device, "stop": sampling.stop}
    loading |= {"pad_token": config.pad_token, "temperature": sampling.temperature}
    policy = frozen_policy("policy", folder, tokenizer, **loading, fast_kernels=config.fast_kernels)
    check_embeddings("policy", policy.model, tokenizer, prompts.rows)
    return prompts, policy


def _content(prompts: PromptStream, place: int, policy: Policy, config: SampleConfig) -> Any:
    """Return a prompt as it is written: its text or messages, or what is left of one that is cut."""
    if config.sampling.prompt_tokens is not None:
        return policy.tokenizer.decode(prompts.rows[place], skip_special_tokens=True)
    given = prompts.prompts[place].content
    return given if isinstance(given, str) else list(given)


def _generate(
    file: SampleFile,
    prompts: PromptStream,
    contents: Sequence[Any],
    policy: Policy,
    config: SampleConfig,
    signals: Signals,
    on_step: ProgressCallback,
) -> None:
    """Answer the prompts from the first that has no row, in the batches of an uninterrupted run."""
    count, total = max(1, config.sampling.batch_size // config.sampling.samples_per_prompt), len(prompts.rows)
    first = file.count // count * count  # a batch that a kill cut off is computed as a whole, for the same numbers
    with activity("sampling", total, unit="prompt", start=file.count) as entry:
        signals.in_training = True
        for start in range(first, total, count):
            places = range(start, min(start + count, total))
            rollouts = _answers(policy, [prompts.rows[i] for i in places], places, config)
            made = [_row(policy, prompts, contents, i, rollouts, i - start, config) for i in places]
            new = made[file.count - start :]
            file.append(new)
            entry.advance(len(new))
            times = {"seconds": entry.seconds, "seconds_left": entry.seconds_left or 0.0}
            file.run.write_progress(step=entry.done, steps=total, **{k: round(v, 1) for k, v in times.items()})
            on_step(file.count, total, {})
            if signals and file.count < total:
                raise Interrupted(f"interrupted after {file.count} of {total} prompts.", 128 + signals.caught)
        signals.in_training = False


def _answers(policy: Policy, rows: list[list[int]], places: Sequence[int], config: SampleConfig) -> Rollouts:
    """Return the answers to some prompts; each prompt has random numbers of its own."""
    sampling, uniforms = config.sampling, []
    for place in places:
        generator = torch.Generator().manual_seed(config.seed * SEED_STEP + place)
        uniforms.append(draw_uniforms(sampling.samples_per_prompt, sampling.max_new_tokens, generator))
    truncation = Truncation(sampling.top_k, sampling.top_p, sampling.min_p)
    unused = torch.Generator()
    return sample(policy, rows, sampling, unused, uniforms=torch.cat(uniforms), truncation=truncation)


def _row(
    policy: Policy,
    prompts: PromptStream,
    contents: Sequence[Any],
    place: int,
    rollouts: Rollouts,
    group: int,
    config: SampleConfig,
) -> dict[str, Any]:
    """Return the row of prompt number `place`, which is `group` in the batch of `rollouts`."""
    own = (rollouts.group == group).nonzero()[:, 0].tolist()
    ids = [rollouts.response_ids[i][rollouts.mask[i]].tolist() for i in own]
    texts = [_text(policy.tokenizer, prompts.rows[place], one, contents[place]) for one in ids]
    row = {"item": item_id(contents[place], texts), "prompt": contents[place], "completions": texts}
    row |= {"completion_ids": ids, "logprobs": _numbers(rollouts.logprobs, rollouts, own)}
    if "sampling_logprobs" in rollouts.evidence:
        row["sampling_logprobs"] = _numbers(rollouts.evidence["sampling_logprobs"], rollouts, own)
    assert rollouts.ended is not None
    row |= {"ended": rollouts.ended[own].tolist(), "policy": config.policy, "seed": config.seed}
    row["settings"] = to_dict(config.sampling)
    given = prompts.prompts[place].content
    if isinstance(given, Conversation):
        row |= {"tools": given.tools} if given.tools else {}
        row |= {"chat_template_kwargs": given.template_kwargs} if given.template_kwargs else {}
    return row


def _numbers(values: torch.Tensor, rollouts: Rollouts, own: Sequence[int]) -> list[list[float]]:
    return [[round(x, FLOATS) for x in values[i][rollouts.mask[i]].tolist()] for i in own]


def _text(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int], content: Any) -> str:
    """Return an answer as text; behind a text, what the answer adds to it, spaces at its start included."""
    alone = str(tokenizer.decode(answer, skip_special_tokens=True))
    if not isinstance(content, str):
        return alone
    before = str(tokenizer.decode(prompt, skip_special_tokens=True))
    whole = str(tokenizer.decode([*prompt, *answer], skip_special_tokens=True))
    return whole[len(before) :] if whole.startswith(before) else alone


def _figures(file: SampleFile) -> dict[str, Any]:
    """Return what the rows hold: counts, lengths in tokens, answers that ended, prompts with two equal answers."""
    lengths, ended, equal = list[int](), 0, 0
    for row in file.rows():
        lengths += map(len, row["completion_ids"])
        ended += sum(row["ended"])
        equal += len(set(row["completions"])) < len(row["completions"])
    counts = {"prompts": file.count, "completions": len(lengths), "prompts_with_equal_answers": equal}
    length = mean_interval([float(n) for n in lengths])
    return counts | {"length": length, "ended": proportion(ended, len(lengths))}
