"""All rules on combinations of methods and settings, and the defaults that depend on the method.

Each rule is one line of a table: when it applies, the setting and the value it names, what is expected, and the fix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from apportion import credit
from apportion.compatibility._refusal import Refusal
from apportion.compatibility.rewards import check_rewards, specs_of
from apportion.config import DiagnoseConfig, RLConfig
from apportion.errors import ConfigError, format_problem
from apportion.registry import EvidenceKey
from apportion.system import time_limit
from apportion.types import Credit, Estimator, Method, PolicyLoss, Segmenter
from apportion.user_code import user_defined_names

GROUP = 4  # rollouts of one prompt where an estimator compares them
EPOCHS = {True: 4, False: 1}  # passes over a batch, with a critic and without


# --- methods ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Combination:
    """The four choices as built, and the name of each by field ("credit", "segments", "advantages", "loss")."""

    credits: Mapping[str, Credit]
    segment: Segmenter
    estimate: Estimator
    loss: PolicyLoss
    names: Mapping[str, str]

    @property
    def dense(self) -> list[str]:
        """The credits that move a reward to other tokens: its place is all that they determine, up to a constant."""
        return [
            name
            for name, one in self.credits.items()
            if name != "sparse" and (one.keeps_return or one.share is not None or one.redistributes)
        ]

    @property
    def beyond_the_score(self) -> list[str]:
        """The credits that a mean score of fresh rollouts does not estimate; a KL penalty is paid where it arises."""
        return [name for name in self.credits if name not in ("sparse", "kl_penalty")]

    @property
    def sharing(self) -> list[str]:
        """The credits that declare how they share a score out."""
        return [name for name, one in self.credits.items() if one.share is not None]

    @property
    def weighs(self) -> bool:
        """Whether the estimator weighs its advantage by the credit's shares."""
        return "credit_share" in self.estimate.needs

    @property
    def scalar(self) -> bool:
        """Whether the estimator uses the sum of each row's rewards only."""
        return bool(getattr(self.estimate, "scalar", False))

    @property
    def one_advantage(self) -> bool:
        """Whether all tokens of a response have the same advantage."""
        return not self.weighs and (self.scalar or self.names["segments"] == "whole_response")


METHODS: tuple[Refusal[Combination], ...] = (
    Refusal(
        lambda c: c.scalar and bool(c.dense) and not c.weighs,
        "credit",
        lambda c: f"{c.dense[0]} with {c.names['advantages']}",
        "sparse: this estimator sums each row's rewards, so where they land is lost",
        "Set advantages.credit_mix above 0 to weigh its advantage by the credit's shares, or use sparse.",
    ),
    Refusal(
        lambda c: c.weighs and not c.sharing,
        "advantages",
        lambda c: f"credit_mix > 0 of {c.names['advantages']} with {' + '.join(c.credits)}",
        "a credit that shares a score out (uniform, attention, policy_attention)",
        "Choose such a credit, or set advantages.credit_mix to 0.",
    ),
    Refusal(
        lambda c: c.loss.ratio == "sequence" and not c.one_advantage,
        "loss",
        lambda c: f"{c.names['loss']} with the token-wise advantages of {c.names['advantages']}",
        "one advantage a response: its ratio covers the whole response",
        "Use gspo's token form (loss: {gspo: {token: true}}), segments: whole_response, or credit_mix 0.",
    ),
    Refusal(
        lambda c: c.loss.ratio == "action" and c.weighs,
        "loss",
        lambda c: f"ratio action with credit_mix > 0 of {c.names['advantages']}",
        "one advantage an action: its ratio covers the whole action",
        "Use ratio: token, or set advantages.credit_mix to 0.",
    ),
    Refusal(
        lambda c: c.names["advantages"] == "vine" and bool(c.beyond_the_score),
        "credit",
        lambda c: f"{c.beyond_the_score[0]} with vine",
        "sparse, with kl_penalty at most: vine's values are mean scores of fresh rollouts, and nothing else is in them",
        "Use sparse with vine, or gae with this credit.",
    ),
    Refusal(
        lambda c: "reference_logprobs" in c.loss.needs and "kl_penalty" in c.credits,
        "loss",
        lambda c: f"kl_coef > 0 of {c.names['loss']} with kl_penalty in the credit",
        "the distance to the reference paid once",
        "Set loss.kl_coef to 0, or drop kl_penalty from the credit (give credit as a list).",
    ),
)


def check_methods(combination: Combination) -> None:
    """Raise ConfigError for the first refusal that applies to the combination."""
    for refusal in METHODS:
        refusal.check(combination)


def check_distinct(names: Sequence[str]) -> None:
    """Raise ConfigError for a credit chain that holds a method twice."""
    if len(set(names)) < len(names):
        raise ConfigError("credit", list(names), "each method once", "Drop the repeated one.")


def check_redistributors(credits: Mapping[str, Credit]) -> None:
    """Raise ConfigError for a credit chain with two that redistribute: that declare a share, or say so."""
    names = [name for name, one in credits.items() if one.share is not None or one.redistributes]
    if len(names) > 1:
        fix = "The second would spread what the first has spread. Choose one."
        raise ConfigError("credit", " with ".join(names), "at most one redistributor", fix)


def discount_warning(method: Method) -> str | None:
    """Return a warning when γ < 1 meets a redistributing credit: the return is then no longer what was scored."""
    gamma = getattr(method.estimate, "gamma", 1.0)
    if gamma >= 1.0 or not (method.credit.share is not None or method.credit.redistributes):
        return None
    expected = "1 with a redistributing credit"
    fix = "With γ < 1 a redistribution changes the discounted return, so the optimum moves. Use gamma: 1."
    return format_problem(f"advantages.{estimator_name(method)}.gamma", gamma, expected, fix)


def estimator_name(method: Method) -> str:
    """Return the name of a method's estimator."""
    return str(next(iter(method.specs["advantages"][0])))


# --- settings ---------------------------------------------------------------------------------------------------------


def resolve_defaults(config: RLConfig, method: Method) -> None:
    """Set what is null in `config` to the method's own value, then check the settings against the method.

    Raises:
        ConfigError: a setting that the method, or another setting, does not allow.
    """
    ppo, sampling, estimate = config.ppo, config.sampling, method.estimate
    if sampling.samples_per_prompt is None:
        sampling.samples_per_prompt = GROUP if method.group_wise else 1
    if ppo.truncated is None:
        ppo.truncated = "terminal"
    if ppo.value_tokens is None:
        ppo.value_tokens = "first" if getattr(estimate, "pooling", "first") == "first" else "all"
    if ppo.epochs is None:
        ppo.epochs = EPOCHS[method.critic]
    if ppo.whiten_advantages is None:
        ppo.whiten_advantages = bool(getattr(estimate, "whitened", method.critic))
    check_rewards(config, method)
    for refusal in SETTINGS:
        refusal.check(Run(config, method))


@dataclass(frozen=True)
class Run:
    """The settings of a run, none of them null, and its method."""

    config: RLConfig
    method: Method

    @property
    def estimator(self) -> str:
        """The name of the estimator."""
        return estimator_name(self.method)

    @property
    def per_prompt(self) -> int:
        """Rollouts of one prompt."""
        return self.config.sampling.samples_per_prompt or 1

    @property
    def pays_prefixes(self) -> bool:
        """Whether the method pays the score of the text so far."""
        return any(EvidenceKey.of(need).name == "prefix_scores" for need in self.method.needs)

    @property
    def cannot_bootstrap(self) -> str | None:
        """The credit whose pay for a cut response no value after the cut completes, and why; None without one."""
        reason = credit.bootstrap_conflict(self.method.credit)
        if reason is None:
            return None
        chain = [pair for spec in self.method.specs["credit"] for pair in spec.items()]
        built_in = [name for name, kwargs in chain if name in credit.METHODS and _conflicts(name, kwargs)]
        guilty = [*built_in, *(name for name, _ in chain if name not in credit.METHODS)]
        return f"{guilty[0]}, which {reason}"

    @property
    def raising(self) -> list[str]:
        """The monitors that raise the KL coefficient."""
        return [f"monitors.{name}" for name, value in self.config.monitors if value == "raise_kl_coef"]

    @property
    def has_penalty(self) -> bool:
        """Whether a kl_penalty with a coefficient above 0 is in the credit chain."""
        chain = (pair for spec in self.method.specs["credit"] for pair in spec.items())
        return any(kwargs.get("coef", 1.0) > 0 for name, kwargs in chain if name == "kl_penalty")

    @cached_property
    def user_functions(self) -> list[str]:
        """The user-supplied functions among the methods and their evidence."""
        timed = [self.method.specs[field] for field in ("credit", "segments", "advantages")]
        functions = [spec.source for spec in specs_of(self.config) if spec.kind == "function"]
        return user_defined_names([*timed, list(self.config.compare), self.method.needs, functions])


def _conflicts(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a built-in credit with these settings pays a cut response what no value after the cut completes."""
    return credit.bootstrap_conflict(credit.make(name, kwargs)) is not None


SETTINGS: tuple[Refusal[Run], ...] = (
    Refusal(
        lambda r: r.config.ppo.ptx_coef > 0 and r.config.ppo.ptx_data is None,
        "ppo.ptx_data",
        lambda r: None,
        "texts to learn, since ppo.ptx_coef is above 0",
        "Name a file with a column text, prompt and completion, or messages, or set ppo.ptx_coef to 0.",
    ),
    Refusal(
        lambda r: r.config.ppo.ptx_coef == 0 and r.config.ppo.ptx_data is not None,
        "ppo.ptx_coef",
        lambda r: r.config.ppo.ptx_coef,
        "above 0, since ppo.ptx_data names texts to learn",
        "Set it to 1, say, or leave ppo.ptx_data out.",
    ),
    Refusal(
        lambda r: bool(r.config.keep_best.every) and r.config.keep_best.prompts is None and r.config.prompts != "imdb",
        "keep_best.prompts",
        lambda r: None,
        "held-out prompts: only the built-in set has some of its own",
        "Name a file of prompts that are not trained on, or set keep_best.every to 0.",
    ),
    Refusal(
        lambda r: bool(r.config.sampling.batch_size % r.per_prompt),
        "sampling.batch_size",
        lambda r: r.config.sampling.batch_size,
        lambda r: f"a multiple of sampling.samples_per_prompt ({r.per_prompt})",
        "A batch holds every sample of each of its prompts: change one of the two.",
    ),
    Refusal(
        lambda r: r.method.group_wise and r.per_prompt < 2,
        "sampling.samples_per_prompt",
        lambda r: r.per_prompt,
        lambda r: f"at least 2 with {r.estimator}, which compares the rollouts of one prompt",
        f"Set it to {GROUP}, say.",
    ),
    Refusal(
        lambda r: r.config.ppo.truncated == "bootstrap" and not r.method.critic,
        "ppo.truncated",
        lambda r: "bootstrap",
        lambda r: f"terminal, mask or penalty: {r.estimator} has no critic to estimate what would have followed",
        "Choose one of them, or gae.",
    ),
    Refusal(
        lambda r: r.config.ppo.truncated == "bootstrap" and r.pays_prefixes,
        "ppo.truncated",
        lambda r: "bootstrap",
        "terminal, mask or penalty with prefix_difference, which pays the score of the text so far",
        "Choose one of them: the critic's value after a cut would count that score again.",
    ),
    Refusal(
        lambda r: r.config.ppo.truncated != "terminal" and r.config.sampling.stop == "length",
        "ppo.truncated",
        lambda r: r.config.ppo.truncated,
        "terminal: with sampling.stop length no response ever ends by itself",
        "Use sampling.stop: eos, where it tells responses apart.",
    ),
    Refusal(
        lambda r: r.config.ppo.truncated == "bootstrap" and r.cannot_bootstrap is not None,
        "ppo.truncated",
        lambda r: "bootstrap",
        lambda r: f"terminal, mask or penalty with {r.cannot_bootstrap}",
        "Choose one of them, or --credit sparse: what this credit would have paid before a cut no critic's value has.",
    ),
    Refusal(
        lambda r: bool(r.raising) and not r.has_penalty,
        lambda r: r.raising[0],
        lambda r: "raise_kl_coef",
        "off, warn or stop: the credit chain has no kl_penalty with a coefficient above 0 to raise",
        "Choose one of them, or add kl_penalty to --credit.",
    ),
    Refusal(
        lambda r: r.config.monitors.timeout is not None and time_limit.SIGNAL is None and bool(r.user_functions),
        "monitors.timeout",
        lambda r: r.config.monitors.timeout,
        lambda r: f"null: this system has no signal that could interrupt {r.user_functions[0]}",
        "Set it to null: the time is then not limited.",
    ),
    Refusal(
        lambda r: r.estimator == "vine" and r.config.ppo.truncated == "penalty",
        "ppo.truncated",
        lambda r: "penalty",
        "terminal or mask: vine's values are mean scores, cut off or not, and carry no penalty",
        "Choose one of them, or gae.",
    ),
    Refusal(
        lambda r: r.estimator == "vine" and r.config.ppo.whiten_rewards,
        "ppo.whiten_rewards",
        lambda r: True,
        "false: vine's values are scores, and whitened rewards are in other units",
        "Use scores.scale, which both go through.",
    ),
    Refusal(
        lambda r: r.config.ppo.value_model != "shared" and not r.method.critic,
        "ppo.value_model",
        lambda r: r.config.ppo.value_model,
        lambda r: f"shared: {r.estimator} learns no values",
        "Leave it out, or choose gae.",
    ),
)


def check_processes(config: RLConfig, processes: int) -> None:
    """Raise ConfigError where a batch has fewer prompts, or a mini-batch fewer rollouts, than there are processes."""
    sampling, fix = config.sampling, "Raise it, or launch fewer."
    prompts = sampling.batch_size // (sampling.samples_per_prompt or 1)
    if prompts < processes:
        expected = f"at least {processes} prompts a batch, one a process: it has {prompts}"
        raise ConfigError("sampling.batch_size", sampling.batch_size, expected, fix)
    if config.ppo.mini_batch < processes:
        expected = f"at least {processes}, a rollout a process"
        raise ConfigError("ppo.mini_batch", config.ppo.mini_batch, expected, fix)


def check_diagnosis(config: DiagnoseConfig) -> None:
    """Raise ConfigError where a diagnosis sets its rollouts of one prompt twice."""
    given = config.sampling.samples_per_prompt
    if given is not None:
        raise ConfigError("sampling.samples_per_prompt", given, "null", "Use --samples here.")
