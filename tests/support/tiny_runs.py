"""Tiny runs for tests: models and prompts on disk, the settings of a run, policies and rollouts in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import tiny_models
import torch
from torch import Tensor

from apportion import Rollouts
from apportion.cli.arguments import parse
from apportion.config import RLConfig, SamplingConfig
from apportion.evidence import Models
from apportion.evidence.scoring import score
from apportion.generation import sample
from apportion.models.policy import Policy
from apportion.models.reward import RewardModel, load_reward
from apportion.stages.rl.learner import Learner
from apportion.stages.rl.models import make_policy
from apportion.stages.rl.sources import FixedSource
from apportion.stages.rl.train import train_batch
from apportion.training.session import TrainingSession

EOS, PAD = 1, 0
SETTINGS: dict[str, Any] = {
    "algorithm": "abc",
    "lora.targets": "attention",
    "optim.eps": 1e-5,
    "steps": 2,
    "checkpoint_every": 0,
    "sampling.batch_size": 6,
    "sampling.max_new_tokens": 5,
    "ppo.epochs": 2,
    "ppo.mini_batch": 4,
    "ppo.micro_batch": 3,
    "lora.rank": 4,
    "optim.lr": 0.01,
    "dtype": "float32",
    "device": "cpu",
}


def world(folder: Path) -> Path:
    """Write a policy, one that often writes EOS, a reward model, prompts and reviews to `folder`; return it."""
    tiny.save_policy(folder / "policy")
    tiny.save_reward(folder / "reward")
    tiny.save_prompts(folder / "prompts.jsonl")
    tiny.save_reviews(folder / "reviews.csv")
    ending = make_policy(config(folder, **{"lora.rank": 0})).model
    make_likely(ending, EOS, 3.5)
    ending.save_pretrained(folder / "ending")
    tiny.tokenizer().save_pretrained(folder / "ending")
    return folder


def flags(folder: Path, output: Path | str = "run", **changes: Any) -> list[str]:
    """Return the flags of a run of two small steps in `folder` (a `world`); `changes` go by dotted names."""
    paths = {"policy": folder / "policy", "reward_model": folder / "reward", "prompts": folder / "prompts.jsonl"}
    chosen = paths | {"output": output} | SETTINGS | changes
    return [str(word) for name, value in chosen.items() for word in (f"--{name}", value)]


def config(folder: Path, output: Path | str = "run", **changes: Any) -> RLConfig:
    """Return the settings that `flags` stands for, read as the command reads them."""
    return parse(RLConfig, "rl", flags(folder, output, **changes)).config


def policy(folder: Path, *, stirred: bool = True, **changes: Any) -> Policy:
    """Return the policy of a run; `stirred` moves adapters and value head away from zero, so that they do something."""
    made = make_policy(config(folder, **changes))
    if stirred:
        stir(made)
    return made


def stir(made: Policy, size: float = 0.1, seed: int = 7) -> None:
    """Add noise to everything that learns."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.trainable():
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)


@torch.no_grad()
def make_likely(model: Any, token: int, strength: float) -> None:
    """Turn the output row of `token` towards the states that the output layer reads, so that its logit is high."""
    ids = torch.randint(3, 400, (16, 8), generator=torch.Generator().manual_seed(3))
    states = model(ids, output_hidden_states=True).hidden_states[-1][:, -1]
    mean = states.mean(dim=0)
    row = model.get_output_embeddings().weight[token]
    row.copy_(strength * mean / mean.norm())


def models(folder: Path, reward: str = "reward", **changes: Any) -> Models:
    """Return a stirred policy and a reward model."""
    return Models(policy(folder, **changes), judge(folder, reward))


def judge(folder: Path, name: str = "reward") -> RewardModel:
    """Return a reward model of the world in float32."""
    return load_reward(str(folder / name), device="cpu")


def prompts(count: int = 5, longest: int = 7, seed: int = 0) -> list[list[int]]:
    """Return ragged prompts of ids that are neither pad nor EOS."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + (3 * i) % longest for i in range(count)]
    return [torch.randint(3, 400, (n,), generator=generator).tolist() for n in lengths]


def sampled(made: Policy, rows: Sequence[Sequence[int]], /, *, seed: int = 0, **settings: Any) -> Rollouts:
    """Return rollouts of the prompts `rows`."""
    chosen = SamplingConfig(**{"max_new_tokens": 6, "temperature": made.temperature, **settings})
    return sample(made, rows, chosen, torch.Generator().manual_seed(seed))


def scored(learner: Learner, step: int = 1) -> Rollouts:
    """Return the scored rollouts that a learner's policy generates for batch `step`."""
    with learner.policy.weights.unsharded():
        rollouts = learner.source.take(step)
        return score(learner.models, rollouts, learner.needs, learner.config.scores, learner.base_evidence)


def one_batch(
    learner: Learner, step: int = 1, rollouts: Rollouts | None = None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Train on batch `step`, on `rollouts` where they are given, and return (metrics, rows), as the stage does."""
    if rollouts is not None:
        learner.source = FixedSource(rollouts)
    return train_batch(TrainingSession(), learner, learner.config, step)


def rollouts_of(
    prompt_rows: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, extra: int = 0
) -> Rollouts:
    """Return unscored rollouts of given ids, with `extra` more pads than needed on both sides."""
    width, length = max(map(len, prompt_rows)) + extra, max(map(len, responses)) + extra
    left = torch.tensor([[PAD] * (width - len(row)) + list(row) for row in prompt_rows])
    right = torch.tensor([list(row) + [PAD] * (length - len(row)) for row in responses])
    before = torch.tensor([[i >= width - len(row) for i in range(width)] for row in prompt_rows])
    mask = torch.tensor([[i < len(row) for i in range(length)] for row in responses])
    zeros = torch.zeros(mask.shape)
    return Rollouts(
        prompt_ids=left,
        prompt_mask=before,
        response_ids=right,
        mask=mask,
        logprobs=zeros,
        group=torch.arange(len(mask)),
    )


def alone(batch: Rollouts, row: int) -> tuple[list[int], list[int]]:
    """Return (prompt ids, response ids) of one row, without padding."""
    prompt = batch.prompt_ids[row][batch.prompt_mask[row]].tolist()
    return prompt, batch.response_ids[row][batch.mask[row]].tolist()


def causal(name: str, seed: int = 0) -> Any:
    """Return a random causal language model of an architecture of `tiny_models`, its weights far from flat."""
    import transformers

    kind, settings = tiny_models.CONFIGS[name]
    more = {"bos_token_id": None, "eos_token_id": EOS}
    chosen = getattr(transformers, kind)(**tiny_models.COMMON | settings | more)
    model = transformers.AutoModelForCausalLM.from_config(chosen, attn_implementation="sdpa").eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter if parameter.dim() == 1 else 0.0))
    return model


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a model folder."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
