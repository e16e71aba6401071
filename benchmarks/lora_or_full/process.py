"""One measured run of `apportion reward` or `apportion rl` in a process of its own: trained bytes and peak memory.

    python -m benchmarks.lora_or_full.process reward RESULT.json TEST.jsonl FLAGS...
    python -m benchmarks.lora_or_full.process rl RESULT.json - FLAGS...

Bytes are those of the tensors that the run's own optimizer holds at its first step: each trained weight, its gradient
before the step, and its state after it (moments, and the lower half of a float32 master where weights learn in 16 bit).
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from apportion.cli.arguments import parse
from apportion.config import RewardConfig, RLConfig
from apportion.errors import ApportionError
from apportion.system import cpu
from benchmarks.harness.recorder import peak_rss

Parts = Mapping[str, Sequence[nn.Parameter]]
EVERYTHING = "all"


class TrainedBytes:
    """Counts the trained weights and their bytes at the first optimizer step of this process.

    Args:
        parts: returns {name: its parameters}, called at that step; None where everything is one part.

    Attributes:
        counted: {name: {"weights": how many, "weight_bytes", "gradient_bytes", "state_bytes"}}, empty before the step.
    """

    def __init__(self, parts: Callable[[], Parts] | None = None) -> None:
        self.counted: dict[str, dict[str, int]] = {}
        self._parts, self._finished = parts, False
        self._hooks = [register_optimizer_step_pre_hook(self._before), register_optimizer_step_post_hook(self._after)]

    def close(self) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()

    def _named(self, optimizer: torch.optim.Optimizer) -> Parts:
        if self._parts is not None:
            return self._parts()
        return {EVERYTHING: [p for group in optimizer.param_groups for p in group["params"]]}

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._finished:
            return
        for name, parameters in self._named(optimizer).items():
            self.counted[name] = {
                "weights": sum(p.numel() for p in parameters),
                "weight_bytes": sum(p.nbytes for p in parameters),
                "gradient_bytes": sum(p.grad.nbytes for p in parameters if p.grad is not None),
            }

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._finished:
            return
        for name, parameters in self._named(optimizer).items():
            states = [optimizer.state[p] for p in parameters if p in optimizer.state]
            tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
            self.counted[name]["state_bytes"] = sum(tensor.nbytes for tensor in tensors)
        self._finished = True


def reward_run(flags: Sequence[str], test: str) -> dict[str, Any]:
    """Run `apportion reward`; return its measures, and of each pair of `test` whether it was judged right."""
    from apportion.stages.reward.train import train

    config, counter = parse(RewardConfig, "reward", flags).config, TrainedBytes()
    train(config, fresh=True)
    counter.close()
    found = {"trained": counter.counted, "peak_mb": peak_rss()}  # before the pairs are judged, which is not measured
    return found | {"right": judged(config, test)}


def judged(config: RewardConfig, test: str) -> list[float]:
    """Return, of each pair, 1 where the chosen text has the higher score, ½ where both have the same, else 0."""
    from apportion.data.answers.rankings import read_rankings
    from apportion.models.reward import load_reward
    from apportion.stages.reward.evaluation import scored
    from apportion.stages.reward.ranked_evaluation import pairs_of
    from apportion.stages.reward.ranked_inputs import Encoder

    folder = str(Path(config.output) / "final")
    reward = load_reward(folder, dtype=config.dtype, device=config.device, field="model")
    units = read_rankings(test, make=Encoder(config, lambda: reward.tokenizer, "test_data"))
    scores = scored(reward, [one for unit in units for one in unit.completions])
    return [pair.right for pair in pairs_of(units, scores.split([len(unit.completions) for unit in units]))]


def rl_run(flags: Sequence[str]) -> dict[str, Any]:
    """Run `apportion rl`; return its measures, of the policy and of its critic."""
    rl: Any = importlib.import_module("apportion.stages.rl.train")
    make, learners = rl.make_learner, list[Any]()

    def kept(*args: Any, **more: Any) -> Any:
        learners.append(make(*args, **more))
        return learners[-1]

    def parts() -> Parts:
        policy = learners[-1].policy
        own = [p for p in policy.model.parameters() if p.requires_grad]
        mine = {id(p) for p in own}
        return {"policy": own, "critic": [p for p in policy.trainable() if id(p) not in mine]}

    rl.make_learner, counter = kept, TrainedBytes(parts)
    try:
        rl.train(parse(RLConfig, "rl", flags).config, fresh=True)
    finally:
        rl.make_learner = make
        counter.close()
    return {"trained": counter.counted, "peak_mb": peak_rss()}


def main() -> int:
    """Run and write the result; 2 with a message where the run refuses its settings or its data."""
    stage, result, test, *flags = sys.argv[1:]
    cpu.keep_freed_memory()  # as every command does
    try:
        found = reward_run(flags, test) if stage == "reward" else rl_run(flags)
    except ApportionError as error:
        print(error, file=sys.stderr)
        return 2
    Path(result).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
