"""Cost of the demo's parts: counted operations and bytes over the machine's rates, at measured efficiencies.

docs/demo.md has the model of the cost and where each number comes from; `python -m benchmarks.demo_plan` measures them
again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from apportion.system.rates import EFFICIENCY, FORWARD, STEP, Rates, Work

BLOCKS, HEAD = 106_168_320, 28_311_552  # weights of SmolLM2-135M in the blocks' linear layers, and in the output layer
EXCERPT = 36  # tokens, the mean of 8 to 64
BY_LENGTH, LONGEST_START = 500, 40  # texts that are also judged by their starts, and the tokens of the longest
PROMPT, NEW = 6, 24  # tokens of a prompt, in the mean, and of a response
FIXED: Mapping[str, float] = {
    "reward": 15.0,
    "save": 6.0,
    "policy": 8.0,
    "save policy": 6.0,
    "evaluation": 18.0,
    "page": 3.0,
}
CONVERSION, MEGABYTES_A_SECOND = 15.0, 5.0  # of what is fetched: seconds to convert it, and a modest network


class Amounts(NamedTuple):
    """Amounts of work.

    Attributes:
        excerpts, batch: training excerpts of the reward model, and of one of its steps.
        probe, texts: excerpts that the head starts from, and held-out texts that it is evaluated on.
        steps, rows, epochs: batches of PPO, their responses, and the passes over them.
        prompts: of the evaluation.
    """

    excerpts: int
    steps: int
    prompts: int = 128
    batch: int = 16
    probe: int = 1000
    texts: int = 1000
    rows: int = 32
    epochs: int = 2

    @property
    def reward_steps(self) -> int:
        """Optimizer steps of the reward model."""
        return -(-self.excerpts // self.batch)


class Cost(NamedTuple):
    """Seconds of work in one precision on a machine of these rates."""

    rates: Rates
    dtype: str

    def reward_start(self, amounts: Amounts) -> float:
        """Return the seconds until the reward model's first step: reading the reviews, the head's start."""
        return FIXED["reward"] + self.probing(amounts)

    def reward_training(self, amounts: Amounts) -> float:
        """Return the seconds of its steps."""
        return self._products("train", STEP * BLOCKS * EXCERPT * amounts.excerpts)

    def reward_end(self, amounts: Amounts) -> float:
        """Return the seconds of saving it and of its evaluation."""
        return FIXED["save"] + self.judging(amounts)

    def policy_start(self) -> float:
        """Return the seconds of loading policy and reward model."""
        return FIXED["policy"]

    def policy_training(self, amounts: Amounts) -> float:
        """Return the seconds of the batches of PPO."""
        batch = self.generation(amounts.rows) + self.scoring(amounts.rows) + self.update(amounts)
        return amounts.steps * batch

    def policy_end(self) -> float:
        """Return the seconds of saving the policy."""
        return FIXED["save policy"]

    def evaluation(self, amounts: Amounts) -> float:
        """Return the seconds of sampling before and after, and of the judge."""
        batches = 2 * amounts.prompts / amounts.rows
        return FIXED["evaluation"] + batches * (self.generation(amounts.rows) + self.scoring(amounts.rows))

    def page(self) -> float:
        """Return the seconds of writing the page."""
        return FIXED["page"]

    def probing(self, amounts: Amounts) -> float:
        """Return the seconds of reading the excerpts that the head starts from."""
        return self._products("read", FORWARD * BLOCKS * EXCERPT * amounts.probe)

    def judging(self, amounts: Amounts) -> float:
        """Return the seconds of reading the held-out texts."""
        tokens = EXCERPT * amounts.texts + LONGEST_START * min(BY_LENGTH, amounts.texts)
        return self._products("read", FORWARD * BLOCKS * tokens)

    def generation(self, rows: int) -> float:
        """Return the seconds of `rows` responses: the products of their tokens, or reading the weights once a token."""
        return self._work.generation(BLOCKS, HEAD, rows, PROMPT, NEW)

    def scoring(self, rows: int) -> float:
        """Return the seconds of the log-probabilities and of the scores of `rows` responses."""
        return self.logprobs(rows) + self.scores(rows)

    def logprobs(self, rows: int) -> float:
        """Return the seconds of a forward pass each of policy and reference."""
        return self._products("score", 2 * FORWARD * rows * (BLOCKS * (PROMPT + NEW) + HEAD * NEW))

    def scores(self, rows: int) -> float:
        """Return the seconds of the reward model's forward pass, which is in float32."""
        return self._products("score", FORWARD * rows * BLOCKS * (PROMPT + NEW), "float32")

    def update(self, amounts: Amounts) -> float:
        """Return the seconds of the passes over one batch."""
        tokens = amounts.rows * (BLOCKS * (PROMPT + NEW) + HEAD * NEW)
        return self._products("update", STEP * amounts.epochs * tokens)

    def share(self, kind: str, dtype: str) -> float:
        """Return the share of the product rate that this kind of work reaches."""
        return EFFICIENCY[dtype][kind]

    def _products(self, kind: str, operations: float, dtype: str = "") -> float:
        return self._work.products(kind, operations, dtype)

    @property
    def _work(self) -> Work:
        return Work(self.rates, self.dtype, self.share)


def fetching(megabytes: float) -> float:
    """Return the seconds of fetching the model and the reviews; 0 where they are there."""
    return megabytes / MEGABYTES_A_SECOND + CONVERSION if megabytes else 0.0
