"""Advantages by position: the metrics by hand, and what they and the monitor say of causal credit and of uniform."""

from __future__ import annotations

import math

import helpers
import pytest
import torch

from apportion import Credit, Rollouts, advantages, credit, monitors, segments
from apportion.masking import whiten
from apportion.stages.rl.metrics import LEAST_ENDS, position_metrics

CORRELATION = "advantage/end_token_length_corr"


def test_every_metric_by_hand() -> None:
    # places of four tokens: quarters 1 2 3 4; of three with a hole: 1 · 2 3; of one: 1; of eight: two each
    mask = helpers.bools(
        [[1, 1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0], [1] * 8, [0] * 8]
    )
    given = torch.tensor(
        [
            [1.0, 2, 3, 4, 9, 9, 9, 9],
            [5.0, 9, 6, 7, 9, 9, 9, 9],
            [9.0, 8, 9, 9, 9, 9, 9, 9],
            [-1.0, -2, -3, -4, -5, -6, -7, -8],
            [9.0] * 8,
        ]
    )
    ended = torch.tensor([True, True, True, False, True])
    found = position_metrics(helpers.poison(given, mask), mask, helpers.rollouts(mask, ended=ended))
    assert found == pytest.approx(
        {
            "advantage/first_token": (1 + 5 + 8 - 1) / 4,
            "advantage/quarter_1": (1 + 5 + 8 - 1 - 2) / 5,
            "advantage/quarter_2": (2 + 6 - 3 - 4) / 4,
            "advantage/quarter_3": (3 + 7 - 5 - 6) / 4,
            "advantage/quarter_4": (4 - 7 - 8) / 3,
            "advantage/end_token": (4 + 7 + 8) / 3,  # the fourth was cut off, the fifth is empty
        }
    )
    sampled = helpers.rollouts(mask, ended=None).with_evidence(sampled_ended=~ended)
    assert position_metrics(given, mask, sampled)["advantage/end_token"] == -8
    assert position_metrics(given, mask, helpers.rollouts(mask))["advantage/end_token"] == (4 + 7 + 8 - 8) / 4
    assert position_metrics(given, mask & False, sampled) == {}


def ladder(ends: list[float], lengths: list[int]) -> dict[str, float]:
    """Return the metrics of rows of these lengths whose end tokens have these advantages."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    given = torch.zeros(mask.shape)
    given[torch.arange(len(ends)), torch.tensor(lengths) - 1] = torch.tensor(ends)
    return position_metrics(given, mask, helpers.rollouts(mask))


def test_the_correlation_by_hand() -> None:
    lengths, ends = list(range(1, 13)), [3.0, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    mean_end, mean_length = sum(ends) / 12, 6.5
    across = sum((e - mean_end) * (n - mean_length) for e, n in zip(ends, lengths, strict=True))
    size = math.sqrt(sum((e - mean_end) ** 2 for e in ends) * sum((n - mean_length) ** 2 for n in lengths))
    assert ladder(ends, lengths)[CORRELATION] == pytest.approx(across / size, abs=1e-6)
    assert ladder([-2.0 * n + 1e6 for n in lengths], lengths)[CORRELATION] == pytest.approx(-1.0, abs=1e-6)
    assert ladder([1e30 * n for n in lengths], lengths)[CORRELATION] == pytest.approx(1.0, abs=1e-6)


def test_no_correlation_of_few_ends_or_of_what_is_constant() -> None:
    few = LEAST_ENDS - 1
    assert CORRELATION not in ladder([float(i) for i in range(few)], list(range(1, few + 1)))
    assert CORRELATION not in ladder([float(i) for i in range(12)], [3] * 12)
    assert CORRELATION not in ladder([0.1, 0.1 + 1e-9] * 6, list(range(1, 13)))


def batch_of(seed: int, rows: int = 32, score: float = 0.0) -> Rollouts:
    """Return responses that end with probability 0.2 a token, whose score is noise plus `score`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (torch.rand(rows, generator=generator).log() / math.log(0.8)).ceil().clamp(1, 20).long()
    mask = torch.arange(20) < lengths[:, None]
    scores = score + 0.3 * torch.randn(rows, generator=generator)
    return helpers.rollouts(mask, ["values"], values=torch.zeros(mask.shape), scores=scores, dirty=False)


def found_in(method: Credit, batch: Rollouts) -> dict[str, float]:
    rewards, _ = credit.apply(method, batch)
    raw = advantages.gae(lam=1.0)(rewards, segments.tokens()(batch), batch).advantages
    return position_metrics(whiten(raw, batch.mask), batch.mask, batch)


def alerts(method: Credit, batches: int = 12, rows: int = 32) -> list[str | None]:
    monitor = monitors.MONITORS["length_bias"]()
    state, messages = monitors.init([monitor]), []
    for seed in range(batches):
        found, state = monitors.observe([monitor], found_in(method, batch_of(seed, rows, score=2.0)), state)
        alert = found.get("length_bias")
        messages.append(alert.message if alert else None)
    return messages


def test_uniform_credit_is_named_and_a_causal_one_is_not() -> None:
    """Scores do not depend on the length here. Uniform pays the end token R/n, less the longer the response."""
    uniform = alerts(credit.uniform())
    assert uniform[:5] == [None] * 5 and all(uniform[5:])
    assert "the end token of short responses has the larger advantage" in str(uniform[-1])
    assert alerts(credit.sparse()) == [None] * 12
    assert alerts(credit.sparse(), batches=60, rows=LEAST_ENDS) == [None] * 60
    slopes = {name: found_in(credit.find(name)(), batch_of(0, 256, 2.0)) for name in ("uniform", "sparse")}
    quarters = [slopes["uniform"][f"advantage/quarter_{i}"] for i in (1, 2, 3, 4)]
    assert quarters == sorted(quarters, reverse=True) and quarters[0] > 0 > quarters[3]
    assert abs(slopes["sparse"]["advantage/quarter_4"]) < 0.2


def test_a_negative_score_turns_the_sign() -> None:
    assert found_in(credit.uniform(), batch_of(0, 64, 2.0))[CORRELATION] < -0.5
    assert found_in(credit.uniform(), batch_of(0, 64, -2.0))[CORRELATION] > 0.5
