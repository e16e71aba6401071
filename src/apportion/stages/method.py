"""The method of a reinforcement-learning run, and the credits logged beside it; built before any model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from apportion import algorithms, credit, registry
from apportion.compatibility import resolve_defaults
from apportion.config import RLConfig, reward_specs
from apportion.errors import ApportionError, ConfigError, format_problem
from apportion.evidence import plan
from apportion.rewards import open_rewards
from apportion.types import Credit, Method
from apportion.user_code import guard_credit


def build_method(config: RLConfig) -> Method:
    """Return the choices of a run, checked, and put the method's own value where a setting of `config` is null.

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
    plan(method.needs)
    comparisons(config.compare)
    resolve_defaults(config, method)
    open_rewards(reward_specs(config.reward_model, config.rewards))
    return method


def comparisons(names: Iterable[str], warn: Callable[[str], None] = lambda line: None) -> dict[str, Credit]:
    """Return the credit methods to log beside the trained one, by name.

    One whose evidence takes a setting, which a name alone cannot give, is left out and named to `warn`.

    Raises:
        ConfigError: an unknown name.
    """
    for name in names:
        registry.find("compare", name, credit.METHODS)  # an unknown one is an error of this setting
    made = {name: guard_credit(name, credit.make(name, {})) for name in names}
    for name, one in list(made.items()):
        try:
            plan(one.needs)
        except ConfigError as error:
            warn(not_logged(name, error))
            del made[name]
    return made


def not_logged(name: str, error: ApportionError, what: str = "is not logged") -> str:
    """Return the warning about a compared credit; no fix, since the run needs none."""
    text = str(error)
    if error.has_parts:
        text = format_problem(error.field, error.got, error.expected, "", row=error.row, token=error.token).rstrip()
    return f"warning: compare: {name} {what}: {text}"
