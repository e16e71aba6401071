"""Records docs/methods/responses.json: three responses of a policy with the evidence of every method.

    python tools/record_responses.py --reward_model runs/demo/reward/final

The prompts and the seed are fixed; the responses are the first ones, not chosen ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from apportion import credit, segments
from apportion.config import DiagnoseConfig, SamplingConfig, ScoreConfig
from apportion.errors import ConfigError
from apportion.evidence import plan
from apportion.evidence.scoring import score
from apportion.generation import sample
from apportion.models.loading import has_bfloat16
from apportion.stages.diagnose.diagnose import open_models

OUT = Path(__file__).parents[1] / "docs" / "methods" / "responses.json"
HOW = (
    "SmolLM2-135M continued the beginnings of three reviews (part rl, the first three; seed 0); the "
    "scores are those of the demo's reward model. Each picture is scaled to its own largest reward."
)


def main() -> int:
    """Sample, score, and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reward_model", default="runs/demo/reward/final")
    parser.add_argument("--tokens", type=int, default=40)
    options = parser.parse_args()
    sampling = SamplingConfig(batch_size=4, max_new_tokens=options.tokens, prompt_tokens=[8, 8])
    dtype = "auto" if has_bfloat16(torch.device("cpu")) else "float32"
    config = DiagnoseConfig(reward_model=options.reward_model, count=3, sampling=sampling, dtype=dtype)
    models, prompts = open_models(config, {})
    assert models.generator is not None
    rollouts = sample(models.policy, prompts, sampling.model_copy(update={"samples_per_prompt": 1}), models.generator)
    rollouts = score(models, rollouts, wanted(), ScoreConfig())
    decode = models.policy.tokenizer.decode
    rows = []
    for i in range(len(rollouts)):
        on = rollouts.mask[i]
        ids = rollouts.response_ids[i][on].tolist()
        evidence = {
            name: numbers(value[i][on]) if value.dim() > 1 else numbers(value[i : i + 1])[0]
            for name, value in rollouts.evidence.items()
        }
        assert rollouts.scores is not None
        rows.append(
            {
                "prompt": decode(prompts[i]),
                "tokens": [decode([t]) for t in ids],
                "ids": ids,
                "score": round(float(rollouts.scores[i]), 6),
                "logprobs": numbers(rollouts.logprobs[i][on]),
                "evidence": evidence,
            }
        )
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"how": HOW, "responses": rows}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {OUT}")
    return 0


def numbers(values: torch.Tensor) -> list[Any]:
    """Return booleans as they are and numbers with six decimals."""
    return [v if isinstance(v, bool) else round(v, 6) for v in values.tolist()]


def wanted() -> frozenset[str]:
    """Return the evidence of every method of which a model can give it without further settings."""
    methods = [f() for f in (*credit.METHODS.values(), *segments.METHODS.values())]
    needs: set[str] = set()
    for method in methods:
        try:
            plan(method.needs)
        except ConfigError:
            continue
        needs |= method.needs
    return frozenset(needs)


if __name__ == "__main__":
    sys.exit(main())
