"""Models and prompts of a run: what is cheap to check comes first, then they are loaded and tried on a few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from apportion.config import RLConfig, reward_models, reward_specs
from apportion.data.bad_rows import leaving_out
from apportion.distributed import sharding
from apportion.evidence import Models
from apportion.evidence.prefix import PREFIX, slow_prefixes
from apportion.evidence.process import prompts_for
from apportion.generation.decoding import SLOW, decoding
from apportion.generation.prompts import PromptStream, encode_prompts
from apportion.models.families import check_family
from apportion.models.loading import context_of, embeddings_of, locate
from apportion.models.policy import Policy, load_policy
from apportion.models.pretrained import load_settings
from apportion.models.reward import RewardModel, adjust, check_length, check_width, load_reward
from apportion.models.text.render import check_embeddings, embedding_count
from apportion.models.text.token_spans import PolicyText
from apportion.models.tokenizers import load_tokenizer
from apportion.models.value_head import ValueStart
from apportion.registry import EvidenceKey
from apportion.rewards import Rewards, add_models, open_rewards
from apportion.stages.attention import check_attention
from apportion.stages.doctor.checks import footprint
from apportion.stages.doctor.findings import WARN, Finding
from apportion.stages.doctor.rl import preflight
from apportion.system.file_weights import FileWeights, file_weights
from apportion.types import Method
from apportion.user_code import UserCode

SPARE = 200e6  # bytes of a disk that are left for logs and for others


def open_models(
    config: RLConfig, method: Method, logged: frozenset[str], user_code: UserCode
) -> tuple[Models, PromptStream, list[Finding]]:
    """Return (the run's models, its prompts, what the user should know of them).

    Args:
        method: guarded. logged: the evidence of what it is compared with.

    Raises:
        ConfigError, ModelError, DataError: each names the fix. Files, settings and prompts are checked before any
            weights are loaded, and what only the loaded models tell (embeddings, decoding, attention) before sampling.
    """
    specs = reward_specs(config.reward_model, config.rewards)
    rewards, folder = open_rewards(specs), locate("policy", config.policy)
    located = {spec.source: locate("reward_model", spec.source) for spec in reward_models(specs)}
    tokenizer, prompts = open_prompts(config, method.needs, folder, logged, rewards)
    findings = preflight(config, folder, tokenizer, prompts.texts, prompts.rows, prompts.hidden)
    text = PolicyText(tokenizer, prompts.conversations, cuts=config.sampling.stop == "eos")
    loading: dict[str, Any] = {"dtype": config.reward_dtype, "device": config.device, "pad_token": config.pad_token}
    loading |= {"fast_kernels": config.fast_kernels, "positive": config.positive_label}
    # by ids where it shares the tokenizer, else by text
    loaded = [load_reward(folder, **loading, policy=text) for folder in located.values()]
    reward = loaded[0] if loaded else None
    adjust(torch.zeros(1), reward, config.scores)  # raises where the statistics that it needs are not there
    policy = make_policy(config, reward)
    check_embeddings("policy", policy.model, tokenizer, prompts.rows)
    for one in loaded:
        check_width("reward_model", one, tokenizer, embedding_count(policy.model), prompts.rows)
        check_length("reward_model", one, prompts.rows, config.sampling.max_new_tokens)
    add_models(rewards, dict(zip(located, loaded, strict=True)))
    if (why := decoding(policy, policy.model).why_slow) is not None:
        findings.append(Finding("policy", WARN, f"{config.policy} {SLOW}: {why}"))
    needs_prefixes = any(EvidenceKey.of(need).name in PREFIX for need in method.needs)
    slow = None if reward is None else slow_prefixes(reward, config.sampling.max_new_tokens)
    if needs_prefixes and slow is not None:
        fix = "An algorithm that needs no prefix scores, such as ppo or abc, takes one."
        findings.append(Finding("reward model", WARN, slow, fix))
    models = Models(policy, reward, method.segment, config.sampling, scores=config.scores, user_code=user_code)
    models.columns, models.conversations, models.rewards = prompts.columns, prompts.conversations, rewards
    check_attention(models, method.needs)
    models.frozen = offload_frozen(config, models, loaded)
    notes = dict.fromkeys(note for one in loaded for note in one.notes)
    return models, prompts, [*findings, *(Finding("reward model", WARN, note) for note in notes)]


def offload_frozen(config: RLConfig, models: Models, rewards: Sequence[RewardModel]) -> FileWeights | None:
    """Return the weights of reward models and reference moved into a file, None where they stay in memory.

    They do where the disk would lack space for what the run saves.
    """
    folder, policy = Path(config.output).expanduser(), models.policy
    own = [] if policy.reference is None or sharding.is_requested() else [policy.reference]
    if not config.offload_frozen or not folder.is_dir():
        return None
    weights, trained = (sum(p.numel() for p in some) for some in (policy.model.parameters(), policy.trainable()))
    spare = footprint.disk(weights, trained, config) + SPARE
    return file_weights([*own, *(one.model for one in rewards)], folder, spare)


def open_prompts(
    config: RLConfig,
    needs: frozenset[str],
    folder: str,
    logged: frozenset[str] = frozenset(),
    rewards: Rewards | None = None,
) -> tuple[Any, PromptStream]:
    """Return (the tokenizer of the policy in `folder`, the prompts with the columns that functions in `needs` take).

    Args:
        logged, rewards: as `prompts_for` takes them.

    Raises:
        ConfigError, DataError: as `prompts_for` and `encode_prompts`.
    """
    with leaving_out(Path(config.output).expanduser(), config.skip_bad_rows) as bad:
        loaded = prompts_for(needs, config.prompts, bad, config.split, logged, rewards)
        settings = load_settings("policy", folder)
        check_family("policy", folder, settings)
        tokenizer = load_tokenizer("policy", folder, config.pad_token)
        limits: dict[str, Any] = {"context": context_of(folder), "embeddings": embeddings_of(folder, settings)}
        return tokenizer, encode_prompts(loaded, tokenizer, config.sampling, config.seed, bad=bad, **limits)


def make_policy(config: RLConfig, reward: RewardModel | None = None) -> Policy:
    """Return the policy to train, its values and its reference.

    Args:
        reward: the run's reward model; required where ppo.value_model is "reward".

    Raises:
        ModelError, ConfigError: as `load_policy` does.
    """
    return load_policy(
        config.policy,
        lora=config.lora,
        max_length=config.sampling.max_length,
        dtype=config.dtype,
        device=config.device,
        pad_token=config.pad_token,
        stop=config.sampling.stop,
        temperature=config.sampling.temperature,
        values=ValueStart(config.ppo.value_model, reward, config.scores),
        fast_kernels=config.fast_kernels,
    )
