"""Agreement and biases of rankings against values computed by hand."""

from __future__ import annotations

import pytest

from apportion.label.results import agreement, bias
from apportion.label.results.figures import figures
from apportion.label.store.items import is_shared
from apportion.label.store.reading import Ranking


def ranking(
    item: str, name: str, ranks: list[int | None] | None, shown: list[int] | None = None, texts: list[str] | None = None
) -> Ranking:
    order = shown or list(range(len(ranks or [1, 2, 3])))
    texts = texts or [f"answer {i}" for i in order]
    kind = "skip" if ranks is None else "ranking"
    return Ranking(item, "prompt", texts, name, kind, ranks, order, 10.0, "current", 0.0)


def test_alpha_of_ranks_is_the_hand_computed_value() -> None:
    """Ranks 1,2,3 and 1,3,2: every value twice, n = 6. Ordinal distances: (1,2) and (2,3) 4, (1,3) 16.

    Observed (2·4 + 2·4) / 6 = 8/3, expected 2·(2·2·4 + 2·2·4 + 2·2·16) / (6·5) = 6.4, alpha = 1 − (8/3)/6.4 = 7/12.
    """
    by = {"item": {"ann": [1, 2, 3], "bob": [1, 3, 2]}}
    assert agreement.alpha_of_ranks(by) == pytest.approx(7 / 12)


def test_alpha_of_pairs_is_the_hand_computed_value() -> None:
    """The same ranks give preferences (−,−), (−,−), (−,+) of three pairs: n = 6, five of one value, one other.

    Observed 2/6, expected 2·5·1/(6·5) = 1/3, alpha = 1 − 1 = 0.
    """
    by = {"item": {"ann": [1, 2, 3], "bob": [1, 3, 2]}}
    assert agreement.alpha_of_pairs(by) == pytest.approx(0.0)


def test_the_same_orders_agree_fully_and_opposite_ones_less_than_by_chance() -> None:
    same = {str(i): {"ann": [1, 2, 3], "bob": [1, 2, 3]} for i in range(4)}
    opposite = {str(i): {"ann": [1, 2, 3], "bob": [3, 2, 1]} for i in range(4)}
    assert agreement.alpha_of_ranks(same) == pytest.approx(1.0)
    opposed = agreement.alpha_of_ranks(opposite)
    assert opposed is not None and opposed < 0


@pytest.mark.parametrize(
    "by",
    [
        {},
        {"item": {"ann": [1, 2]}},
        {"item": {"ann": [1, 1], "bob": [1, 1]}},
        {"item": {"ann": [1, None], "bob": [None, 1]}},
    ],
)
def test_alpha_without_comparable_values_is_not_defined(by: dict[str, dict[str, list[int | None]]]) -> None:
    assert agreement.alpha_of_ranks(by) is None


@pytest.mark.parametrize(
    ("one", "two", "tau"),
    [
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 3], [1, 3, 2], 1 / 3),  # two concordant pairs, one discordant
        ([1, 2, 2], [1, 2, 3], 2 / (2 * 3) ** 0.5),  # tau-b: one tie
        ([1, 2, None], [2, 1, 3], -1.0),  # only what both judged
        ([1, 1, 1], [1, 2, 3], None),
        ([1, None, None], [1, 2, 3], None),
    ],
)
def test_tau(one: list[int | None], two: list[int | None], tau: float | None) -> None:
    assert agreement.kendall_tau(one, two) == (None if tau is None else pytest.approx(tau))


def test_mean_tau_of_three_people_counts_every_two_of_them() -> None:
    by = {"item": {"ann": [1, 2, 3], "bob": [1, 2, 3], "cy": [3, 2, 1]}}
    taus = agreement.pair_taus(by)
    assert [(t.one, t.two, t.tau) for t in taus] == [("ann", "bob", 1.0), ("ann", "cy", -1.0), ("bob", "cy", -1.0)]
    assert agreement.mean_tau(taus)["mean"] == pytest.approx(-1 / 3)  # type: ignore[index]
    assert agreement.mean_tau(taus, "bob")["mean"] == pytest.approx(0.0)  # type: ignore[index]
    assert agreement.mean_tau([]) is None


def test_position_bias_counts_shares_of_ties_and_leaves_out_what_could_not_be_judged() -> None:
    rankings = [
        ranking("a", "ann", [1, 2, 3], [0, 1, 2]),  # the first shown is the best
        ranking("b", "ann", [1, 2, 1], [2, 1, 0]),  # first and last share it
        ranking("c", "ann", [1, None, 2], [1, 0, 2]),
        ranking("d", "ann", None),
    ]
    found = bias.position_bias(rankings)
    assert [one.share["mean"] for one in found] == [0.75, 0.0, 0.25]
    assert [one.chance for one in found] == [pytest.approx(1 / 3)] * 3
    assert [one.rankings for one in found] == [2, 2, 2]
    assert bias.first_place_excess(rankings) == pytest.approx(0.75 - 1 / 3)


def test_length_bias_is_one_where_longer_is_always_better() -> None:
    texts = ["a", "bbb", "cc"]
    assert bias.length_bias([ranking("a", "ann", [3, 1, 2], texts=texts)])["mean"] == pytest.approx(1.0)  # type: ignore[index]
    assert bias.length_bias([ranking("a", "ann", [1, 3, 2], texts=texts)])["mean"] == pytest.approx(-1.0)  # type: ignore[index]
    assert bias.length_bias([ranking("a", "ann", None)]) is None


def test_figures_list_the_items_with_the_least_agreement_first() -> None:
    rankings = [
        ranking("same", "ann", [1, 2, 3]), ranking("same", "bob", [1, 2, 3]),
        ranking("near", "ann", [1, 2, 3]), ranking("near", "bob", [1, 3, 2]),
        ranking("far", "ann", [1, 2, 3]), ranking("far", "bob", [3, 2, 1]),
        ranking("skipped", "bob", None),
    ]  # fmt: skip
    found = figures(rankings)
    assert (found["ranked"], found["skipped"], found["agreement"]["items"]) == (6, 1, 3)
    assert [one["item"] for one in found["disagreements"]] == ["far", "near"]
    bob = found["annotators"][1]
    assert (bob["name"], bob["ranked"], bob["skipped"], bob["ties"]) == ("bob", 3, 1, 0.0)
    assert bob["tau"]["mean"] == pytest.approx((1 + 1 / 3 - 1) / 3)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 3), (0.25, 7), (0.5, 15), (1.0, 30)])
def test_the_share_of_items_for_several_people_is_exact_and_spread(share: float, count: int) -> None:
    flags = [is_shared(i, share) for i in range(30)]
    assert sum(flags) == count
    halves = sum(flags[:15]), sum(flags[15:])
    assert abs(halves[0] - halves[1]) <= 1
