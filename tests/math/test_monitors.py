"""The monitors on series made by hand: what fires, at which batch, and what healthy runs show."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from apportion import monitors
from apportion.monitors._monitor import CALM, START, WEIGHT, follow, share

# the demo's run: 40 batches of 32 responses of SmolLM2-135M, ABC, adaptive κ (every fourth batch); its responses have
# one length, so the correlation is that of noise
DEMO = {
    "objective/kl": [-0.0044, 0.508, 1.9, 3.4, 5.0, 5.6, 6.3, 7.1, 8.3, 6.9],
    "objective/length": [24.0] * 10,
    "objective/entropy": [3.182, 3.443, 3.595, 3.3, 3.1, 2.9, 2.7, 2.486, 2.6, 2.847],
    "objective/scores_std": [1.13, 1.517, 1.921, 1.4, 1.2, 1.1, 1.01, 1.3, 1.4, 1.445],
    "sampling/logprob_gap": [0.0038, 0.0038, 0.0035, 0.0045, 0.0095, 0.0013, 0.002, 0.004, 0.003, 0.0029],
    "policy/approxkl": [0.0019, 0.002, 0.003, 0.006, 0.004, 0.003, 0.002, 0.0015, 0.0013, 0.0013],
    "policy/ratio_limited": [0.0] * 10,
    "advantage/end_token_length_corr": [0.05, -0.21, 0.11, -0.3, 0.02, 0.17, -0.08, 0.2, -0.15, 0.04],
    "loss/value": [0.176, 0.147, 0.2907, 0.349, 0.2, 0.135, 0.2, 0.22, 0.21, 0.211],
}


def fired(name: str, **series: Sequence[float]) -> list[int]:
    """Return the batches, from 1, at which monitor `name` fires; keyword a__b is metric a/b."""
    monitor = monitors.MONITORS[name]()
    return [step for step, found in steps(monitor, series) if found is not None]


def steps(monitor: monitors.Monitor, series: dict[str, Sequence[float]]) -> list[tuple[int, monitors.Alert | None]]:
    state, found = monitors.init([monitor]), []
    named = {key.replace("__", "/"): values for key, values in series.items()}
    for step in range(len(next(iter(named.values())))):
        message, state = monitors.observe([monitor], {key: values[step] for key, values in named.items()}, state)
        found.append((step + 1, message[monitor.name]))
    return found


def test_a_healthy_run_fires_nothing() -> None:
    every = [make() for make in monitors.MONITORS.values()]
    state = monitors.init(every)
    for step in range(10):
        found, state = monitors.observe(every, {key: values[step] for key, values in DEMO.items()}, state)
        assert found == dict.fromkeys(monitors.MONITORS)


def test_the_running_mean_and_the_start_by_hand() -> None:
    stored, values = torch.zeros(3, dtype=torch.float64), [2.0, 4.0, 6.0, 8.0, 10.0, 1.0, 1.0]
    recent, tracks = values[0], []
    for i, value in enumerate(values):
        track, stored = follow(stored, value)
        before = None if i == 0 else recent
        recent = value if i == 0 else recent + WEIGHT * (value - recent)
        assert track.value == value and track.recent == pytest.approx(recent) and track.before == before
        tracks.append(track)
    assert START == 5 and [t.start for t in tracks] == [None] * 5 + [6.0, 6.0]
    assert stored.tolist() == pytest.approx([7, 6.0, recent])


@pytest.mark.parametrize(
    ("name", "series", "expected"),
    [
        # once below −5, or −1 in the running mean: 0.9, 0.9, … then −2: 0.9 − ⅓·2.9 = −0.07, −0.71, −1.14
        ("negative_kl", {"objective__kl": [0.9, 0.9, -5.1, 0.9]}, [3]),
        ("negative_kl", {"objective__kl": [0.9, 0.9, -2.0, -2.0, -2.0, -2.0]}, [5, 6]),
        ("negative_kl", {"objective__kl": [-0.4, -0.9, 0.3, -0.9]}, []),
        # at once above 0.3; else only above 0.1 and five times the start
        ("sampler_gap", {"sampling__logprob_gap": [0.31]}, [1]),
        ("sampler_gap", {"sampling__logprob_gap": [0.04] * 5 + [0.12] * 9}, []),
        ("sampler_gap", {"sampling__logprob_gap": [0.001] * 5 + [0.2, 0.2, 0.2]}, [7, 8]),
        # one batch above 0.5; ratios beyond e^±20 in more than a hundredth of the tokens; ten times the start
        ("ratio", {"policy__approxkl": [0.002, 0.6, 0.002]}, [2]),
        ("ratio", {"policy__approxkl": [0.002, 0.01], "policy__ratio_limited": [0.0, 0.02]}, [2]),
        ("ratio", {"policy__approxkl": [0.002] * 5 + [0.04] * 9}, []),
        ("ratio", {"policy__approxkl": [0.002] * 5 + [0.29, 0.29]}, [7]),
        # below 0.3 of the start, or below 0.005 at any time
        ("entropy", {"objective__entropy": [3.0] * 5 + [0.6] * 6}, [11]),
        ("entropy", {"objective__entropy": [3.0] * 5 + [1.0] * 20}, []),
        ("entropy", {"objective__entropy": [0.004]}, [1]),
        # three times the start, or a third of it
        ("length", {"objective__length": [20.0] * 5 + [100.0] * 3}, [7, 8]),
        ("length", {"objective__length": [20.0] * 5 + [59.0] * 30}, []),
        ("length", {"objective__length": [30.0] * 5 + [1.0] * 4}, [8, 9]),
        # beyond ±0.5 in the running mean once the start is over: 0.6 0.6 0.6 0.6 0.6, then 0.6, 0.33, 0.15
        ("length_bias", {"advantage__end_token_length_corr": [0.6] * 6 + [-0.2] * 2}, [6]),
        ("length_bias", {"advantage__end_token_length_corr": [0.0] * 5 + [-0.7] * 5}, [9, 10]),
        ("length_bias", {"advantage__end_token_length_corr": [0.49, -0.9, 0.8, -0.4, 0.9, 0.49, 0.5, 0.5]}, []),
        # a tenth of the start's spread; nine tenths of the scores at the clip
        ("reward", {"objective__scores_std": [1.0] * 5 + [0.0] * 6}, [11]),
        ("reward", {"objective__scores_std": [0.0] * 6}, [6]),
        ("reward", {"objective__scores_std": [1.0] * 3, "objective__scores_clipped": [0.5, 1.0, 1.0]}, []),
        (
            "reward",
            {"objective__scores_std": [1.0] * 9, "objective__scores_clipped": [0.5] + [1.0] * 8},
            [5, 6, 7, 8, 9],
        ),
        ("value_loss", {"loss__value": [0.2] * 5 + [4.0] * 2}, [7]),
        ("value_loss", {"loss__value": [0.2] * 5 + [1.9] * 9}, []),
        ("value_loss", {"loss__value": [1e-5] * 5 + [0.009] * 9}, []),
        # a sparse reward, 0 or 1: nothing succeeds at first, then a tenth, a quarter, a half; a critic that knows the
        # mean loses ½p(1 − p)
        (
            "value_loss",
            {
                "loss__value": [1e-6] * 5 + [0.045] * 6 + [0.094] * 6 + [0.125] * 9,
                "objective__scores_std": [0.0] * 5 + [0.3] * 6 + [0.433] * 6 + [0.5] * 9,
            },
            [],
        ),
        # one batch in three succeeds
        (
            "value_loss",
            {
                "loss__value": [0.0] * 5 + [0.045, 0.005, 0.005] * 6,
                "objective__scores_std": [0.0] * 5 + [0.3, 0, 0] * 6,
            },
            [],
        ),
        # a critic that diverges: running means 0.04, 2.03 and 3.35 against 10 · ½ · 0.25
        (
            "value_loss",
            {"loss__value": [1e-6] * 5 + [0.125, 6.0, 6.0], "objective__scores_std": [0.0] * 5 + [0.5] * 3},
            [7, 8],
        ),
        # 2 nats a token; a batch beyond four times the mean before it plus half a nat a token
        ("kl", {"objective__kl": [1.0, 13.0, 15.0, 15.0], "objective__length": [10.0] * 4}, [2]),
        ("kl", {"objective__kl": [14.0] * 3 + [30.0] * 3, "objective__length": [10.0] * 6}, [5, 6]),
        ("kl", {"objective__kl": [0.0, 4.9, 9.0, 18.0], "objective__length": [10.0] * 4}, []),
    ],
)
def test_what_fires_when(name: str, series: dict[str, list[float]], expected: list[int]) -> None:
    assert fired(name, **series) == expected


def test_an_episode_is_announced_once_and_ends_after_quiet_batches() -> None:
    monitor = monitors.MONITORS["negative_kl"]()
    bad, fine = -20.0, 20.0
    series = [bad, fine, fine, bad, *[fine] * CALM, bad]
    begins = [step for step, found in steps(monitor, {"objective/kl": series}) if found is not None and found.begins]
    fires = [step for step, found in steps(monitor, {"objective/kl": series}) if found is not None]
    assert begins == [1, len(series)] and {1, 4, len(series)} <= set(fires)


def test_a_monitor_without_its_metric_reports_nothing() -> None:
    every = [make() for make in monitors.MONITORS.values()]
    state = monitors.init(every)
    found, after = monitors.observe(every, {"objective/entropy": 3.0, "policy/ratio_limited": 1.0}, state)
    assert found == {"entropy": None}
    assert [name for name in state if not torch.equal(state[name], after[name])] == [
        "entropy objective/entropy",
        "entropy episode",
    ]


def test_a_saved_and_restored_state_continues_identically() -> None:
    monitor = monitors.MONITORS["entropy"]()
    series = [3.0, 2.9, 3.1, 3.0, 3.0, 2.0, 1.0, 0.5, 0.4, 0.3, 0.2]
    whole = [found.message if found else None for _, found in steps(monitor, {"objective/entropy": series})]
    state, parts = monitors.init([monitor]), []
    for value in series:
        state = {name: tensor.clone() for name, tensor in state.items()}
        before = {name: tensor.clone() for name, tensor in state.items()}
        found, after = monitors.observe([monitor], {"objective/entropy": value}, state)
        assert all(torch.equal(before[name], state[name]) for name in before)  # the old one is not written to
        parts.append(found["entropy"].message if found["entropy"] else None)
        state = after
    assert parts == whole and whole[-1] is not None and "the run's start (3)" in whole[-1]


def test_thresholds_are_settings_of_the_factory() -> None:
    strict = monitors.MONITORS["length"](rise=1.1)
    assert [s for s, found in steps(strict, {"objective/length": [10.0] * 5 + [12.0] * 4}) if found] == [7, 8, 9]


def test_words_for_a_share() -> None:
    assert share(0.41, 3.28) == "12.5% of the run's start (3.28)"
    assert share(30.0, 3.0) == "10 times the run's start (3)"
    assert share(1.0, 0.0) == "inf times the run's start (0)"
