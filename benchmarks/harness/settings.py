"""Settings of `benchmarks.speed`, the peers, and the work of one process; standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from apportion.errors import ConfigError, unknown_name

PRECISIONS = ("float32", "autocast", "bfloat16")
ENOUGH = 5  # timed batches; a median of fewer says little


class Peer(NamedTuple):
    """A released trainer: the package to install, the module that runs it, and what it is compared with.

    `shape` is the work where no flag says otherwise; `lr` is the package's own default, used on both sides.
    """

    project: str
    version: str
    module: str
    algorithm: str
    lr: float
    shape: Mapping[str, int]

    @property
    def spec(self) -> str:
        """The requirement for pip."""
        return f"{self.project}=={self.version}"


_PPO = {"batch": 16, "samples": 1, "prompt_tokens": 8, "new_tokens": 24, "epochs": 4}
_GROUP = {"batch": 32, "samples": 8, "prompt_tokens": 128, "new_tokens": 64, "epochs": 1}
PEERS: Mapping[str, Peer] = {
    "trl-ppo": Peer("trl", "1.12.0", "benchmarks.peers.trl_ppo", "ppo", 3e-6, _PPO),
    "trl-grpo": Peer("trl", "1.16.0", "benchmarks.peers.trl_group", "grpo", 1e-6, _GROUP),
    "trl-rloo": Peer("trl", "1.16.0", "benchmarks.peers.trl_group", "rloo", 1e-6, _GROUP),
}


@dataclass
class SpeedConfig:
    """Seconds and memory of a batch, ours and a peer's, at the same work.

    Attributes:
        peer: the released trainer beside ours: trl-ppo (TRL 1.12.0), trl-grpo or trl-rloo (TRL 1.16.0).
        ours: "full" (all weights, a separate value model with PPO: the peer's work), or "default" (our own defaults:
            adapters, a value head on the shared trunk).
        ours_settings: overrides of `apportion rl` settings for our side, each "name=value".
        peer_precision: float32, autocast (bfloat16 products over float32 weights), bfloat16 (weights too), or best: all
            three for two batches each, then the fastest.
        model: policy, reference and trunk of the reward model: `smollm2`, a folder, or a hub id.
        prompts: where prompts come from: `imdb`, a file or folder with a column prompt or text, or a hub id.
        batches: timed batches of each side.
        rounds: alternations between ours and the peer; a process each, with one warm-up batch.
        batch: rollouts a batch; null is the peer's default (16 with PPO, else 32).
        samples: rollouts of one prompt; null is 1 with PPO, else 8.
        prompt_tokens: tokens of every prompt; null is 8 with PPO, else 128.
        new_tokens: tokens of every response; null is 24 with PPO, else 64.
        epochs: passes over a batch; null is 4 with PPO, else 1.
        mini_batch: rollouts an optimizer step; null is the whole batch.
        peer_micro_batch: rollouts a forward pass of the peer's update; null is the whole mini-batch.
        peer_checkpointing: let the peer recompute activations, as it does by default: slower, less memory.
        threads: of each process; null is every core available to this process.
        device: auto, cpu, cuda.
        pad_token: the padding token, for a tokenizer without one.
        seed: random seed.
        output: the result file; null is benchmarks/results/speed-PEER-OURS.json.
    """

    peer: str = "trl-ppo"
    ours: str = "full"
    ours_settings: list[str] = field(default_factory=list)
    peer_precision: str = "best"
    model: str = "smollm2"
    prompts: str = "imdb"
    batches: int = 6
    rounds: int = 2
    batch: int | None = None
    samples: int | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    epochs: int | None = None
    mini_batch: int | None = None
    peer_micro_batch: int | None = None
    peer_checkpointing: bool = False
    threads: int | None = None
    device: str = "auto"
    pad_token: str | None = None
    seed: int = 0
    output: str | None = None


@dataclass
class Work:
    """The work of one process, passed to it as a file: paths, the shape of a batch, and the number of batches.

    `role` is "ours" or "peer"; `precision` is the peer's. The first `warmup` batches are not timed;
    `count` adds an untimed one at the end under a counter of operations; `responses` adds each timed batch's ids.
    """

    role: str
    model: str
    reward: str
    prompts: str
    folder: str
    algorithm: str
    lr: float
    batch: int
    samples: int
    prompt_tokens: int
    new_tokens: int
    epochs: int
    mini_batch: int
    micro_batch: int
    threads: int
    device: str
    pad_token: str | None
    seed: int
    ours: str = "full"
    overrides: list[str] = field(default_factory=list)
    precision: str = "float32"
    checkpointing: bool = False
    warmup: int = 1
    batches: int = 3
    count: bool = False
    responses: bool = False

    @property
    def total(self) -> int:
        """Number of batches, timed or not."""
        return self.warmup + self.batches + self.count

    @property
    def steps(self) -> int:
        """Optimizer steps a batch."""
        return self.epochs * self.batch // self.mini_batch


def check(config: SpeedConfig) -> None:
    """Raise ConfigError for an invalid setting, before anything is loaded or installed."""
    if config.peer not in PEERS:
        raise unknown_name("peer", config.peer, PEERS)
    for name, known in (("ours", ("full", "default")), ("peer_precision", (*PRECISIONS, "best"))):
        value = getattr(config, name)
        if value not in known:
            raise unknown_name(name, value, known)
    for name in ("batches", "rounds", "threads", "prompt_tokens", "new_tokens", "peer_micro_batch"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(name, value, "a whole number >= 1", f"Set {name} to one.")
    if config.rounds > config.batches:
        expected = f"at most batches ({config.batches}): a round times one batch at least"
        raise ConfigError("rounds", config.rounds, expected, "Lower it, or raise batches.")
    if config.output is not None and not config.output.strip():
        raise ConfigError("output", config.output, "a file name, or null", "Leave it out for the default.")
    _check_shape(shaped(config))
    for text in config.ours_settings:
        if not text.partition("=")[0].strip() or "=" not in text:
            raise ConfigError("ours_settings", text, '"name=value"', "Example: [ppo.micro_batch=8].")


def _check_shape(config: SpeedConfig) -> None:
    assert config.batch and config.samples and config.mini_batch and config.peer_micro_batch
    grouped = PEERS[config.peer].shape["samples"] > 1
    if not grouped and config.samples != 1:
        expected = f"1: {config.peer} samples each prompt once"
        raise ConfigError("samples", config.samples, expected, "Leave it out, or choose trl-grpo.")
    if not grouped and config.peer_micro_batch < config.mini_batch < config.batch:
        expected = f"mini_batch ({config.mini_batch}): TRL's PPO cannot accumulate within one of several mini-batches"
        raise ConfigError("peer_micro_batch", config.peer_micro_batch, expected, "Leave it out.")
    for name, size, other in (
        ("samples", config.batch, "batch"),
        ("mini_batch", config.batch, "batch"),
        ("peer_micro_batch", config.mini_batch, "mini_batch"),
    ):
        if size % getattr(config, name):
            expected = f"a divisor of {other} ({size})"
            raise ConfigError(name, getattr(config, name), expected, "Change one of the two.")


def shaped(config: SpeedConfig) -> SpeedConfig:
    """Return the settings with the peer's default shape where they are null."""
    shape: dict[str, Any] = {
        name: value if getattr(config, name) is None else getattr(config, name)
        for name, value in PEERS[config.peer].shape.items()
    }
    mini = config.mini_batch or shape["batch"]
    return replace(config, **shape, mini_batch=mini, peer_micro_batch=config.peer_micro_batch or mini)
