"""The stages' settings. Standard library only: reading, checking and explaining them loads no model code.

Each dataclass is one section of a YAML file and one group of flags (`--lora.rank 8`); the docstrings are the help.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from apportion.config.monitors import MonitorsConfig
from apportion.config.ranges import CHOICES, NAMES, RANGES
from apportion.errors import ConfigError

Spec = Any  # a method: a name, {name: {key: value}}, or a list of these


@dataclass
class LoraConfig:
    """Low-rank adapters.

    Attributes:
        rank: rank of each adapter; 0 trains all weights instead.
        alpha: the adapter's output is scaled by alpha/rank.
        targets: "attention" (every attention projection), "all" (every linear layer of the blocks), or names.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: Any = "attention"


@dataclass
class OptimConfig:
    """AdamW and its schedule.

    Attributes:
        lr: peak learning rate.
        warmup: part of the steps over which it rises; then it falls linearly to 0.
        eps: Adam's epsilon.
        weight_decay: decoupled weight decay.
        max_grad_norm: clip the gradient's norm to this.
        moments: of weights that learn in 16 bit (lora.rank 0): float32, or bfloat16, which saves 4 bytes a weight.
    """

    lr: float = 5e-4
    warmup: float = 0.05
    eps: float = 1e-5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    moments: str = "float32"


@dataclass
class SamplingConfig:
    """How responses are written: plain sampling, no top-k, no top-p.

    Attributes:
        batch_size: rollouts a step.
        samples_per_prompt: rollouts of one prompt; null picks 1, and 4 for estimators that compare a prompt's rollouts.
        rows: rollouts written at a time (memory and speed only; the rest enter as others end); null writes all at once.
        max_new_tokens: longest response, tokens.
        stop: "length" writes exactly max_new_tokens (EOS is never sampled); "eos" ends at EOS.
        temperature: divides the logits in sampling and in every log-probability.
        prompt_tokens: keep the first n tokens of each prompt, n drawn evenly from [low, high]; null keeps it all.
        max_prompt_tokens: longest prompt, tokens; a longer one is an error.
    """

    batch_size: int = 32
    samples_per_prompt: int | None = None
    rows: int | None = None
    max_new_tokens: int = 24
    stop: str = "length"
    temperature: float = 1.0
    prompt_tokens: Any = field(default_factory=lambda: [4, 8])
    max_prompt_tokens: int = 512


@dataclass
class PPOConfig:
    """The update.

    Attributes:
        epochs: passes over each batch; null picks 4 with a critic and 1 without.
        mini_batch: rollouts an optimizer step.
        micro_batch: most rollouts a forward and backward pass (memory only; it does not change the result).
        micro_tokens: most positions of it, padded to its longest row; rows of like length go together.
        value_clip: value clip; null for none.
        value_coef: weight of the value loss.
        value_tokens: where values are learned: "first" token of each action, where it is chosen, or "all" (as the
            released MA-RLHF code does); null picks first unless the estimator pools values of other tokens.
        whiten_advantages: unit variance and no mean over the batch; null picks what the estimator's paper does.
        whiten_rewards: unit variance, mean kept; it rescales dense credit, so off by default.
        value_model: "shared" (a head on the policy's trunk), "separate" (a trunk of its own, at first the policy's) or
            "reward" (a trunk of its own, at first the reward model: V begins as the score of the text so far).
        truncated: what a response without EOS means: "terminal" (it is over: the limit is part of the task),
            "bootstrap" (it is unfinished: no score yet, the critic says what would have come), "mask" (it teaches
            nothing) or "penalty"; null is terminal.
        truncation_penalty: score of a truncated response when truncated is "penalty".
    """

    epochs: int | None = None
    mini_batch: int = 16
    micro_batch: int = 16
    micro_tokens: int = 2048
    value_clip: float | None = 0.2
    value_coef: float = 0.1
    value_tokens: str | None = None
    whiten_advantages: bool | None = None
    whiten_rewards: bool = False
    value_model: str = "shared"
    truncated: str | None = None
    truncation_penalty: float = -1.0


@dataclass
class ScoreConfig:
    """What is done to a sequence's score before it is apportioned; never anything a token.

    Attributes:
        center: subtract the reward model's mean score on its held-out set.
        scale: divide by its standard deviation there.
        clip: then clamp to [-clip, clip]; null for none.
        micro_batch: most rollouts a forward pass of a scoring model.
        micro_tokens: most positions of it, prompts and responses padded to its longest.
    """

    center: bool = False
    scale: bool = False
    clip: float | None = None
    micro_batch: int = 32
    micro_tokens: int = 4096


@dataclass
class RewardConfig:
    """`apportion reward`: train a 2-class reward model, R = logit(positive) − logit(negative).

    Attributes:
        model: start: `smollm2`, a folder, or a hub id.
        data: `imdb`, a CSV/JSONL/Parquet file or folder with columns text and label, or a hub id.
        test_data: held-out data of the same form; null holds out a fixed part of `data` by hash.
        skip_bad_rows: leave rows out that cannot be used, count them and write them to bad_rows.jsonl; off, the first
            of them is an error.
        output: run folder.
        excerpts: training excerpts, each cut at random from a text.
        excerpt_tokens: shortest and longest clip, tokens.
        probe_excerpts: excerpts to fit the head on by logistic regression before training; 0 starts from a random head.
        batch_size: excerpts an optimizer step.
        micro_batch: excerpts a forward and backward pass (memory only; it does not change the result).
        test_texts: held-out texts to evaluate on.
        checkpoint_every: steps between checkpoints; 0 for none.
        keep_checkpoints: newest ones kept.
        disk_wait: seconds to wait for space on a full disk before the run ends; 0 ends it at once.
        max_skipped: updates in a row whose loss or gradient is not finite before the run stops; each one is skipped.
        pad_token: a token of the tokenizer to pad with, when it has none of its own.
        seed: random seed.
        device: auto, cpu, cuda.
        threads: processor threads of torch; null takes OMP_NUM_THREADS where it is set, else the cores that are free.
        dtype: auto (bfloat16 where the processor has it), float32, bfloat16.
        fast_kernels: faster layers with equal results to rounding; off, every layer is transformers' and peft's own.
        lora: adapters, merged when saved.
        optim: optimizer.
    """

    model: str = "smollm2"
    data: str = "imdb"
    test_data: str | None = None
    skip_bad_rows: bool = False
    output: str = "runs/reward"
    excerpts: int = 10000
    excerpt_tokens: list[int] = field(default_factory=lambda: [8, 64])
    probe_excerpts: int = 2000
    batch_size: int = 16
    micro_batch: int = 16
    test_texts: int = 1000
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    disk_wait: float = 300.0
    max_skipped: int = 3
    pad_token: str | None = None
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    dtype: str = "auto"
    fast_kernels: bool = True
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3))


@dataclass
class RLConfig:
    """`apportion rl`: train a policy against a reward model, its score apportioned over the tokens.

    Attributes:
        policy: start and reference: `smollm2`, a folder, or a hub id.
        reward_model: any sequence classifier with 1 or 2 labels: a folder or a hub id.
        prompts: `imdb`, a file or folder with a column prompt or text, or a hub id.
        skip_bad_rows: leave rows out that cannot be used, count them and write them to bad_rows.jsonl; off, the first
            of them is an error.
        output: run folder.
        algorithm: a named combination (`apportion algorithms` lists them).
        credit: replaces the algorithm's credit: a name, {name: {key: value}}, or a list (the whole chain).
        segments: replaces its segments.
        advantages: replaces its estimator.
        loss: replaces its policy loss.
        steps: batches to learn from.
        checkpoint_every: steps between checkpoints; 0 for none.
        keep_checkpoints: newest ones kept.
        disk_wait: seconds to wait for space on a full disk before the run ends; 0 ends it at once.
        log_rollouts: rollouts of each step written to rollouts.jsonl.
        compare: credit methods whose rewards are logged beside, for the report.
        pad_token: a token of the tokenizer to pad with, when it has none of its own.
        seed: random seed.
        device: auto, cpu, cuda.
        threads: processor threads of torch; null takes OMP_NUM_THREADS where it is set, else the cores that are free.
        dtype: the policy's: auto (bfloat16 where the processor has it), float32, bfloat16.
        reward_dtype: the reward model's; float32 makes logged credit reproducible to 1e-5.
        fast_kernels: faster layers and decoding with equal results to rounding; off, every layer is transformers' and
            peft's own.
    """

    policy: str = "smollm2"
    reward_model: str = ""
    prompts: str = "imdb"
    skip_bad_rows: bool = False
    output: str = "runs/rl"
    algorithm: str = "abc"
    credit: Spec = None
    segments: Spec = None
    advantages: Spec = None
    loss: Spec = None
    steps: int = 40
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    disk_wait: float = 300.0
    log_rollouts: int = 4
    compare: list[str] = field(default_factory=lambda: ["sparse", "uniform", "attention", "policy_attention"])
    pad_token: str | None = None
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    dtype: str = "auto"
    reward_dtype: str = "float32"
    fast_kernels: bool = True
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    monitors: MonitorsConfig = field(default_factory=MonitorsConfig)


@dataclass
class EvaluateConfig:
    """`apportion evaluate`: a policy against its start on fresh prompts, judged by its reward model and by others.

    Attributes:
        run: the folder of a finished `apportion rl` run.
        prompts: `imdb` (reviews that no stage was trained on), a file or folder, or a hub id.
        skip_bad_rows: leave rows out that cannot be used, count them and write them to evaluate_bad_rows.jsonl; off,
            the first of them is an error.
        count: prompts to sample on, the first ones.
        judge: also ask a judge that never saw the reward model's data (TF-IDF and logistic regression on IMDb).
        seed: random seed; the start and the policy are sampled with the same one.
        device: auto, cpu, cuda.
        threads: processor threads of torch; null takes OMP_NUM_THREADS where it is set, else the cores that are free.
        dtype: of policy and start: auto, float32, bfloat16.
    """

    run: str = "runs/rl"
    prompts: str = "imdb"
    skip_bad_rows: bool = False
    count: int = 128
    judge: bool = True
    seed: int = 1
    device: str = "auto"
    threads: int | None = None
    dtype: str = "auto"


@dataclass
class DiagnoseConfig:
    """`apportion diagnose`: which credit suits this policy and this reward model, before any training.

    Attributes:
        policy: the policy as it is now: `smollm2`, a folder, or a hub id.
        reward_model: any sequence classifier with 1 or 2 labels: a folder or a hub id.
        prompts: `imdb`, a file or folder with a column prompt or text, or a hub id.
        skip_bad_rows: leave rows out that cannot be used, count them and write them to bad_rows.jsonl; off, the first
            of them is an error.
        output: run folder.
        methods: credits (a name or {name: {key: value}}) and named algorithms to compare.
        count: prompts, the units over which intervals are taken.
        samples: rollouts of each prompt; their mean is the baseline.
        batch: rollouts of the batch that the signal-to-noise ratio is stated for.
        lam: λ of the credits' reward-to-go; 1 judges the credit alone. A named algorithm keeps its own estimator.
        width: gradients are taken by the last states; wider ones are projected to this many dimensions.
        pad_token: a token of the tokenizer to pad with, when it has none of its own.
        seed: random seed.
        device: auto, cpu, cuda.
        threads: processor threads of torch; null takes OMP_NUM_THREADS where it is set, else the cores that are free.
        dtype: the policy's: auto (bfloat16 where the processor has it), float32, bfloat16.
        reward_dtype: the reward model's.
    """

    policy: str = "smollm2"
    reward_model: str = ""
    prompts: str = "imdb"
    skip_bad_rows: bool = False
    output: str = "runs/diagnose"
    methods: list[Any] = field(default_factory=lambda: ["sparse", "uniform", "attention", "prefix_difference"])
    count: int = 128
    samples: int = 32
    batch: int = 32
    lam: float = 1.0
    width: int = 768
    pad_token: str | None = None
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    dtype: str = "auto"
    reward_dtype: str = "auto"
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(batch_size=128))


@dataclass
class DemoConfig:
    """`apportion demo`: reward model, PPO with dense credit, an independent judge, and a page that shows it.

    Attributes:
        output: folder of the stages, the report and summary.json.
        steps: batches of PPO.
        credit: the credit method: attention (ABC), uniform, sparse, policy_attention, or a spec.
        excerpts: training excerpts of the reward model.
        count: fresh prompts for the evaluation before and after.
        lr: learning rate of PPO.
        seed: random seed.
        threads: processor threads of torch; null takes OMP_NUM_THREADS where it is set, else the cores that are free.
    """

    output: str = "runs/demo"
    steps: int = 30
    credit: Spec = "attention"
    excerpts: int = 8000
    count: int = 128
    lr: float = 4e-4
    seed: int = 0
    threads: int | None = None


def to_dict(config: Any) -> dict[str, Any]:
    """Return the settings as a plain nested mapping."""
    return asdict(config)


def check(config: Any, where: str = "") -> None:
    """Raise ConfigError for a setting outside its range, before anything is loaded. Recurses into sections."""
    for f in fields(config):
        name, value = where + f.name, getattr(config, f.name)
        if is_dataclass(value):
            check(value, f"{name}.")
        elif f.name in RANGES and (value is not None or "None" not in str(f.type)):
            low, high, expected = RANGES[f.name]
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not low <= value <= high:
                raise ConfigError(name, value, expected, f"Set {name} to a value in that range.")
        elif f.name in CHOICES and value not in CHOICES[f.name]:
            expected = "one of " + ", ".join(str(c) for c in CHOICES[f.name])
            raise ConfigError(name, value, expected, f"Set {name} to one of them.")
        elif f.type == "str" and not (isinstance(value, str) and value.strip()):
            raise ConfigError(name, value, *NAMES.get(f.name, ("a name or a path", f"Set {name} to one.")))
    _check_together(config, where)


def _check_together(config: Any, where: str) -> None:
    """Raise ConfigError for pairs and lists, and for settings that do not go together."""
    if isinstance(config, SamplingConfig) and config.prompt_tokens is not None:
        _check_pair(where + "prompt_tokens", config.prompt_tokens)
    if hasattr(config, "excerpt_tokens"):
        _check_pair(where + "excerpt_tokens", config.excerpt_tokens)
    if isinstance(config, SamplingConfig) and config.batch_size % (config.samples_per_prompt or 1):
        expected = f"a multiple of {where}samples_per_prompt ({config.samples_per_prompt})"
        fix = "A batch holds every sample of each of its prompts: change one of the two."
        raise ConfigError(f"{where}batch_size", config.batch_size, expected, fix)
    if isinstance(config, LoraConfig):
        names = [config.targets] if isinstance(config.targets, str) else config.targets
        if not isinstance(names, list) or not names or not all(isinstance(n, str) and n for n in names):
            expected = '"attention", "all", or a list of layer names'
            raise ConfigError(f"{where}targets", config.targets, expected, "Example: [q_proj, v_proj].")


def _check_pair(name: str, pair: Any) -> None:
    whole = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(x) is int for x in pair)
    if not whole or not 1 <= pair[0] <= pair[1]:
        raise ConfigError(name, pair, "[low, high] with 1 <= low <= high", "Example: [4, 8].")
