"""The table of producers: what each pass can tell about a batch, what it costs, and what it has to be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from apportion.evidence.attribution import attribution_pass
from apportion.evidence.implicit import implicit_pass
from apportion.evidence.policy import policy_pass, reference_pass
from apportion.evidence.process import process_pass
from apportion.evidence.reward import reward_pass
from apportion.evidence.shapley import shapley_pass
from apportion.evidence.text.boundaries import need, text_boundaries
from apportion.evidence.vine import GIVES as VINE
from apportion.evidence.vine import vine_pass
from apportion.types import Rollouts

if TYPE_CHECKING:
    from apportion.evidence import Models


class Producer(NamedTuple):
    """One pass: the evidence it can give, the forwards and backwards it costs a micro-batch, and the pass itself.

    `produce(models, rollouts, wanted)` returns {name: tensor} for the wanted names, which carry their settings
    (`registry.asked`). The rollouts hold what earlier producers gave. `requires` are settings that a need must carry,
    each with the fix where it is absent. `ready(wanted)` is called before any model is loaded and raises ConfigError
    where a package that they need is not installed.
    """

    gives: frozenset[str]
    forwards: int
    backwards: int
    produce: Callable[[Models, Rollouts, frozenset[str]], Mapping[str, Tensor]]
    requires: Mapping[str, str] = {}
    ready: Callable[[frozenset[str]], None] = lambda wanted: None


POLICY = frozenset(
    {"old_logprobs", "values", "bootstrap_values", "entropy", "policy_attention_mean", "policy_attention_last"}
)
PRODUCERS: Mapping[str, Producer] = {
    "policy": Producer(POLICY, 1, 0, lambda models, rollouts, wanted: policy_pass(models.policy, rollouts, wanted)),
    "reference": Producer(
        frozenset({"reference_logprobs"}),
        1,
        0,
        lambda models, rollouts, wanted: reference_pass(models.policy, rollouts),
    ),
    "reward": Producer(
        frozenset({"scores", "reward_attention", "prefix_scores", "prompt_score"}),
        1,
        0,
        lambda models, rollouts, wanted: reward_pass(models.reward, rollouts, wanted),
    ),
    "attribution": Producer(
        frozenset({"reward_attribution"}),
        1,
        1,
        lambda models, rollouts, wanted: attribution_pass(models.reward, rollouts),
    ),
    "shapley": Producer(
        frozenset({"shapley_values", "shapley_empty", "shapley_error", "shapley_calls", "shapley_joined"}),
        64,  # texts a rollout, or what the setting `budget` says: at most; "shapley_calls" counts them
        0,
        shapley_pass,
    ),
    "implicit": Producer(
        frozenset({"implicit_logprobs"}),
        1,
        0,
        implicit_pass,
        {"model": "Set implicit.model to the model that DPO trained from the reference: --credit.implicit.model PATH."},
    ),
    "process": Producer(
        frozenset({"process_rewards"}),
        0,
        0,
        process_pass,
        {"function": "Set process.function to your package.module:function."},
    ),
    "text": Producer(
        frozenset({"sentence_boundaries", "phrase_boundaries", "phrase_fallback"}),
        0,
        0,
        lambda models, rollouts, wanted: text_boundaries(models.policy.tokenizer, rollouts, wanted),
        ready=need,
    ),
    # last: it asks the run's segmenter, which may need what stands above
    "vine": Producer(
        VINE,
        9,  # texts an action, or what the setting `samples` says; "vine_calls" counts them, a rollout
        0,
        vine_pass,
    ),
}
