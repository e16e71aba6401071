"""Settings of `apportion rl`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from apportion.config.monitors import MonitorsConfig
from apportion.config.schema.rules import (
    AlgorithmName,
    Count,
    CountOrZero,
    Device,
    Dtype,
    Finite,
    Label,
    Name,
    Names,
    NotNegative,
    Positive,
    RepositoryName,
    RewardModelName,
    Rewards,
    Seed,
    Spec,
    Switch,
    Trackers,
    Word,
)
from apportion.config.schema.section import Section
from apportion.config.sections import LoraConfig, OptimConfig, SamplingConfig, ScoreConfig

COMPARE = ("sparse", "uniform", "attention", "policy_attention")


class PPOConfig(Section):
    """The policy and value update, whichever loss it minimises (`loss` chooses it)."""

    epochs: Count | None = None
    """passes over each batch; null picks 4 with a critic and 1 without."""
    mini_batch: Count = 16
    """rollouts an optimizer step."""
    micro_batch: Count = 16
    """most rollouts a forward and backward pass (memory only; it does not change the result)."""
    micro_tokens: Count = 2048
    """most positions of it, padded to its longest row; rows of like length go together."""
    value_clip: Positive | None = 0.2
    """value clip; null for none."""
    value_coef: NotNegative = 0.1
    """weight of the value loss."""
    value_tokens: Literal["first", "all"] | None = None
    """where values are learned: "first" token of each action, where it is chosen, or "all" (as the released MA-RLHF
    code does); null picks first unless the estimator pools values of other tokens."""
    whiten_advantages: Switch | None = None
    """unit variance and zero mean over the batch; null picks what the estimator's paper does."""
    whiten_rewards: Switch = False
    """unit variance, mean kept; it rescales dense credit, so off by default."""
    value_model: Literal["shared", "separate", "reward"] = "shared"
    """"shared" (a head on the policy's trunk), "separate" (a trunk of its own, initialised from the policy's) or
    "reward" (a trunk of its own, initialised from the reward model: V begins as the score of the text so far)."""
    truncated: Literal["terminal", "bootstrap", "mask", "penalty"] | None = None
    """what a response without EOS means: "terminal" (it is over: the limit is part of the task), "bootstrap" (it is
    unfinished: no score yet, the critic estimates what would have followed; not with a credit that spreads the score),
    "mask" (it is excluded from the loss) or "penalty"; null is terminal."""
    truncation_penalty: Finite = -1.0
    """score of a truncated response when truncated is "penalty"."""
    ptx_coef: NotNegative = 0.0
    """PPO-ptx: weight of the negative log-likelihood (nats a token) of texts in ptx_data in each optimizer step's loss;
    0 for none."""
    ptx_data: Name | None = None
    """those texts: a file, folder or hub id with a column text, prompt and completion, or messages; of the latter two
    only the completion, or the last answer, is learned."""
    ptx_batch: Count = 16
    """texts an optimizer step."""
    ptx_tokens: Count = 256
    """longest text, tokens; a longer one is cut."""


class KeepBestConfig(Section):
    """The policy with the highest reward on held-out prompts, saved to best/ with its step and figure."""

    every: CountOrZero = 0
    """steps between two trials; 0 for none."""
    prompts: Name | None = None
    """held-out prompts: a file, folder or hub id; null only for the built-in set, which has some of its own."""
    split: Name | None = None
    """the split of them to read, of a folder or hub set with splits; null for train."""
    count: Count = 64
    """how many of them, the first ones; one response each."""


class RLConfig(Section):
    """`apportion rl`: train a policy against reward models, functions or rules, their score apportioned over tokens."""

    policy: Name = "smollm2"
    """start and reference: `smollm2`, a folder, or a hub id."""
    reward_model: RewardModelName | None = None
    """any sequence classifier with 1 or 2 labels: a folder or a hub id; the short form of one in rewards."""
    rewards: Rewards = None
    """one or several of: reward models, functions in TRL's signature, rules (exact, json, math, regex, tests), each
    with its weight: docs/rewards.md."""
    prompts: Name = "imdb"
    """`imdb`, a file or folder with a column prompt, messages or text (or chosen and rejected), or a hub id."""
    split: Name | None = None
    """the split of `prompts` to read, of a folder or hub set with splits; null for train."""
    skip_bad_rows: Switch = False
    """skip unusable rows, count them and write them to bad_rows.jsonl; off, the first of them is an error."""
    output: Name = "runs/rl"
    """run folder."""
    algorithm: AlgorithmName = "red"
    """a named combination of credit, segments, estimator and loss; `apportion algorithms` lists them."""
    credit: Spec = None
    """replaces the algorithm's credit; a list replaces the whole chain, its KL penalty included."""
    segments: Spec = None
    """replaces its segments."""
    advantages: Spec = None
    """replaces its estimator."""
    loss: Spec = None
    """replaces its policy loss."""
    steps: Count = 40
    """training steps, one batch of rollouts each."""
    checkpoint_every: CountOrZero = 20
    """steps between checkpoints; 0 for none."""
    keep_checkpoints: Count = 2
    """number of newest checkpoints to keep."""
    disk_wait: NotNegative = 300.0
    """seconds to wait for space on a full disk before the run ends; 0 ends it at once."""
    trackers: Trackers = Field(default_factory=list)
    """where to log every metric too: tensorboard, wandb, trackio, one or several; empty for nowhere."""
    tracker_project: Name = "apportion"
    """the project of wandb and trackio."""
    push_to_hub: RepositoryName | None = None
    """upload the final model to this repository of the hub, with the token of HF_TOKEN or `hf auth login`."""
    hub_private: Switch = True
    """make that repository private, where it does not exist yet."""
    license: Name | None = None
    """licence of the final model, for its card, such as apache-2.0; null says that none was given."""
    log_rollouts: CountOrZero = 4
    """rollouts of each step written to rollouts.jsonl."""
    compare: Names = Field(default_factory=lambda: list(COMPARE))
    """credit methods whose rewards are logged for comparison, for the report; attention only with a reward model."""
    pad_token: Word | None = None
    """a token to pad with, added to the policy's vocabulary where it is new; null is its own, or EOS."""
    positive_label: Label | None = None
    """name or number of the reward model's label whose logit raises the score, where names do not say which is good."""
    seed: Seed = 0
    """random seed."""
    device: Device = "auto"
    """where the models compute."""
    threads: Count | None = None
    """processor threads of torch; null takes OMP_NUM_THREADS where it is set, else the cores that are free."""
    dtype: Dtype = "auto"
    """the policy's: auto (bfloat16 where the processor has it), float32, bfloat16."""
    reward_dtype: Dtype = "float32"
    """the reward model's; float32 makes logged credit reproducible to 1e-5."""
    fast_kernels: Switch = True
    """faster layers and decoding, equal up to rounding; off, every layer is that of transformers and peft."""
    offload_frozen: Switch = True
    """reward models and the reference's own weights lie in a file in the run folder between their uses (Linux, on a
    CPU): the update has their memory. It ends with the run and changes no number."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    scores: ScoreConfig = Field(default_factory=ScoreConfig)
    ppo: PPOConfig = Field(default_factory=PPOConfig)
    lora: LoraConfig = Field(default_factory=lambda: LoraConfig(targets="all"))
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig(lr=1e-3, eps=1e-8))
    monitors: MonitorsConfig = Field(default_factory=MonitorsConfig)
    keep_best: KeepBestConfig = Field(default_factory=KeepBestConfig)
