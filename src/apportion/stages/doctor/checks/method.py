"""Checks of the method: combinations of settings that are allowed but rarely intended."""

from __future__ import annotations

from apportion.compatibility import discount_warning
from apportion.registry import EvidenceKey
from apportion.stages.doctor.case import Case
from apportion.stages.doctor.findings import Result, ok, warn

FULL_RATE = 1e-4  # a learning rate for adapters; all weights take a tenth to a hundredth of it


def unusual(case: Case) -> Result:
    """Credit, segments, estimator, loss and steps are a usual combination."""
    config, method = case.config, case.method
    names = {field: [next(iter(spec)) for spec in specs] for field, specs in method.specs.items()}
    message = f"{' + '.join(names['credit'])}, {names['segments'][0]}, {names['advantages'][0]}, {names['loss'][0]}"
    discounted = discount_warning(method)
    if discounted is not None:
        gamma = getattr(method.estimate, "gamma", 1.0)
        return warn(f"{message} with γ {gamma:g}", "Use gamma 1: a discounted redistribution moves the optimum.")
    if config.lora.rank == 0 and config.optim.lr > FULL_RATE:
        return warn(f"{message}; all weights at learning rate {config.optim.lr:g}", "Lower optim.lr to about 1e-5.")
    prompts = config.sampling.batch_size // (config.sampling.samples_per_prompt or 1)
    if method.group_wise and prompts == 1:
        message = f"{message}; every batch is {config.sampling.batch_size} rollouts of a single prompt"
        return warn(message, "Raise sampling.batch_size, or lower sampling.samples_per_prompt.")
    steps = (config.ppo.epochs or 1) * -(-config.sampling.batch_size // config.ppo.mini_batch)
    if names["loss"][0] == "reinforce" and steps > 1:
        fix = "Set ppo.epochs to 1 and ppo.mini_batch to sampling.batch_size, or use the loss ppo."
        return warn(
            f"{message}; {steps} optimizer steps a batch, and the loss does not correct for the later ones", fix
        )
    return ok(f"{message}; {prompts} prompts and {steps} optimizer steps a batch")


def reads_attention(case: Case) -> bool:
    """Whether any credit of the run, trained or only logged, needs the reward model's attention."""
    from apportion.credit import REWARD_ATTENTION

    return any(EvidenceKey.of(need).name == REWARD_ATTENTION for need in case.notes.get("needs", case.method.needs))


def needs_attention(case: Case) -> bool:
    """Whether the trained method needs it, which then cannot be left out."""
    from apportion.credit import REWARD_ATTENTION

    return any(EvidenceKey.of(need).name == REWARD_ATTENTION for need in case.method.needs)
