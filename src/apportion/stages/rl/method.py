"""The choices of a run, built and checked before any model library is loaded."""

from __future__ import annotations

from apportion import algorithms
from apportion.config import PPOConfig, RLConfig
from apportion.errors import ConfigError
from apportion.evidence import plan
from apportion.registry import EvidenceKey
from apportion.stages.rl.rollout_log import comparisons
from apportion.system import time_limit
from apportion.types import Method
from apportion.user_code import user_defined_names

GROUP = 4  # rollouts of one prompt where an estimator compares them
EPOCHS = {True: 4, False: 1}  # passes over a batch, with a critic and without


def build_method(config: RLConfig) -> Method:
    """Return the choices of a run, checked, and settle in `config` what was left to them (null).

    Raises:
        ConfigError: an unknown name, a bad setting, or a combination that means nothing. Loads no model.
    """
    method = algorithms.build(
        config.algorithm,
        credit_spec=config.credit,
        segments_spec=config.segments,
        advantages_spec=config.advantages,
        loss_spec=config.loss,
    )
    plan(method.needs.union(*(compared.needs for compared in comparisons(config.compare).values())))
    settle(config, method)
    return method


def settle(config: RLConfig, method: Method) -> None:
    """Put the method's own value where a setting is null, and refuse settings that the method cannot work with."""
    ppo, sampling, name = config.ppo, config.sampling, next(iter(method.specs["advantages"][0]))
    if sampling.samples_per_prompt is None:
        sampling.samples_per_prompt = GROUP if method.group_wise else 1
    if sampling.batch_size % sampling.samples_per_prompt:
        expected = f"a multiple of sampling.samples_per_prompt ({sampling.samples_per_prompt})"
        fix = "A batch holds every sample of each of its prompts: change one of the two."
        raise ConfigError("sampling.batch_size", sampling.batch_size, expected, fix)
    if method.group_wise and sampling.samples_per_prompt < 2:
        expected = f"at least 2 with {name}, which compares the rollouts of one prompt"
        got = sampling.samples_per_prompt
        raise ConfigError("sampling.samples_per_prompt", got, expected, f"Set it to {GROUP}, say.")
    if ppo.truncated is None:
        ppo.truncated = "terminal"
    if ppo.truncated == "bootstrap" and not method.critic:
        expected = f"terminal, mask or penalty: {name} has no critic to ask what would have come"
        raise ConfigError("ppo.truncated", "bootstrap", expected, "Choose one of them, or gae.")
    if ppo.truncated == "bootstrap" and any(EvidenceKey.of(need).name == "prefix_scores" for need in method.needs):
        expected = "terminal, mask or penalty with prefix_difference, which pays the score of the text so far"
        fix = "Choose one of them: the critic's value after a cut would count that score again."
        raise ConfigError("ppo.truncated", "bootstrap", expected, fix)
    if ppo.truncated != "terminal" and sampling.stop == "length":
        expected = "terminal: with sampling.stop length no response ever ends by itself"
        fix = "Use sampling.stop: eos, where it tells responses apart."
        raise ConfigError("ppo.truncated", ppo.truncated, expected, fix)
    _refuse_raising_kl_coef(config, method)
    _refuse_timeout(config, method)
    if name == "vine":
        _refuse_other_units(ppo)
    if ppo.value_model != "shared" and not method.critic:
        expected = f"shared: {name} learns no values"
        raise ConfigError("ppo.value_model", ppo.value_model, expected, "Leave it out, or choose gae.")
    if ppo.value_tokens is None:
        ppo.value_tokens = "first" if getattr(method.estimate, "pooling", "first") == "first" else "all"
    if ppo.epochs is None:
        ppo.epochs = EPOCHS[method.critic]
    if ppo.whiten_advantages is None:
        ppo.whiten_advantages = bool(getattr(method.estimate, "whitened", method.critic))


def _refuse_other_units(ppo: PPOConfig) -> None:
    """Raise ConfigError for settings that change the rewards and not vine's values, which are mean scores."""
    if ppo.truncated == "penalty":
        expected = "terminal or mask: vine's values are mean scores, cut off or not, and carry no penalty"
        raise ConfigError("ppo.truncated", "penalty", expected, "Choose one of them, or gae.")
    if ppo.whiten_rewards:
        expected = "false: vine's values are scores, and whitened rewards are in other units"
        raise ConfigError("ppo.whiten_rewards", True, expected, "Use scores.scale, which both go through.")


def _refuse_raising_kl_coef(config: RLConfig, method: Method) -> None:
    """Raise ConfigError for a monitor that should raise a KL coefficient where there is none to raise."""
    monitors = [f"monitors.{key}" for key, value in vars(config.monitors).items() if value == "raise_kl_coef"]
    penalties = [kwargs for spec in method.specs["credit"] for name, kwargs in spec.items() if name == "kl_penalty"]
    if monitors and not any(kwargs.get("coef", 1.0) > 0 for kwargs in penalties):
        expected = "off, warn or stop: no kl_penalty with a coefficient above 0 is in the credit chain to be raised"
        fix = "Choose one of them, or add kl_penalty to --credit."
        raise ConfigError(monitors[0], "raise_kl_coef", expected, fix)


def _refuse_timeout(config: RLConfig, method: Method) -> None:
    """Raise ConfigError for a time limit on user-supplied functions where no signal could end one (Windows)."""
    timed = [method.specs[kind] for kind in ("credit", "segments", "advantages")]
    names = user_defined_names([*timed, list(config.compare), method.needs])
    if names and time_limit.SIGNAL is None and config.monitors.timeout is not None:
        expected = f"null: this system has no signal that could end {names[0]}"
        fix = "Set it to null: then there is no time limit."
        raise ConfigError("monitors.timeout", config.monitors.timeout, expected, fix)
