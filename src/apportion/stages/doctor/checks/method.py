"""Checks of the method: combinations that are refused, and settings that are rarely meant together."""

from __future__ import annotations

from apportion.algorithms import discount_warning
from apportion.registry import EvidenceKey
from apportion.stages.doctor.case import Case
from apportion.stages.doctor.findings import ok, warn

Said = tuple[str, str, str]
FULL_RATE = 1e-4  # a learning rate for adapters; all weights take a tenth to a hundredth of it


def unusual(case: Case) -> Said:
    """Credit, segments, estimator, loss and steps go together as they are usually used."""
    config, method = case.config, case.method
    names = {field: [next(iter(spec)) for spec in specs] for field, specs in method.specs.items()}
    said = f"{' + '.join(names['credit'])}, {names['segments'][0]}, {names['advantages'][0]}, {names['loss'][0]}"
    discounted = discount_warning(method)
    if discounted is not None:
        gamma = getattr(method.estimate, "gamma", 1.0)
        return warn(f"{said} with γ {gamma:g}", "Use gamma 1: a discounted redistribution moves the optimum.")
    if config.lora.rank == 0 and config.optim.lr > FULL_RATE:
        return warn(f"{said}; all weights at learning rate {config.optim.lr:g}", "Lower optim.lr to about 1e-5.")
    prompts = config.sampling.batch_size // (config.sampling.samples_per_prompt or 1)
    if method.group_wise and prompts == 1:
        said = f"{said}; every batch is {config.sampling.batch_size} rollouts of a single prompt"
        return warn(said, "Raise sampling.batch_size, or lower sampling.samples_per_prompt.")
    steps = (config.ppo.epochs or 1) * -(-config.sampling.batch_size // config.ppo.mini_batch)
    if names["loss"][0] == "reinforce" and steps > 1:
        fix = "Set ppo.epochs to 1 and ppo.mini_batch to sampling.batch_size, or use the loss ppo."
        return warn(f"{said}; {steps} optimizer steps a batch, and nothing corrects the later ones", fix)
    return ok(f"{said}; {prompts} prompts and {steps} optimizer steps a batch")


def reads_attention(case: Case) -> bool:
    """Whether any credit that is trained or logged beside reads the reward model's attention."""
    from apportion.credit import REWARD_ATTENTION

    return any(EvidenceKey.of(need).name == REWARD_ATTENTION for need in case.notes.get("needs", case.method.needs))
