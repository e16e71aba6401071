"""The label database on SQLite and PostgreSQL: leases, answers that are saved once, undo, several people at a time."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import postgres
import pytest
from sqlalchemy import text

from apportion.data.answers.item_id import item_id
from apportion.errors import DataError
from apportion.label.items import Item
from apportion.label.store import (
    Answer,
    Store,
    add_items,
    history,
    open_store,
    progress,
    rankings,
    release,
    sign_in,
    submit,
    take,
)
from apportion.label.store.database import url_of
from apportion.label.store.reading import totals

Make = Callable[..., Store]


def item(number: int, size: int = 3) -> Item:
    texts: list[str | list[dict[str, object]]] = [f"answer {j} to {number} \u2603\x00" for j in range(size)]
    return Item(item_id(f"prompt {number}", texts), f"prompt {number}", texts)


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    reason = postgres.absent()
    if reason is not None:
        pytest.skip(reason)
    with postgres.server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """A function (items, overlap) -> an open store with them."""
    opened: list[Store] = []
    url = str(tmp_path / "labels.db") if request.param == "sqlite" else request.getfixturevalue("postgresql")

    def make_store(items: int, overlap: float = 0.0) -> Store:
        store = open_store(url, create=True, seed=7)
        opened.append(store)
        add_items(store, [item(i) for i in range(items)], overlap=overlap)
        return store

    yield make_store
    for store in opened:
        if not store.is_sqlite:
            with store.engine.begin() as connection:
                names = "label_answers, label_assignments, label_annotators, label_items, label_meta"
                connection.execute(text(f"DROP TABLE IF EXISTS {names} CASCADE"))
        store.close()


def test_two_people_get_different_items_and_keep_them_over_a_reload(make: Make) -> None:
    store = make(6)
    ann, bob = sign_in(store, "Ann"), sign_in(store, "Bob")
    first, second = take(store, ann, 2, 60), take(store, bob, 2, 60)
    assert not {w.item for w in first} & {w.item for w in second}
    assert [w.item for w in take(store, ann, 2, 60)] == [w.item for w in first]
    assert [w.answers for w in take(store, ann, 2, 60)] == [w.answers for w in first]
    release(store, ann)
    assert [w.item for w in take(store, bob, 6, 60)][2:4] == [w.item for w in first]


def test_a_lease_that_expired_goes_to_the_next_person_and_a_late_answer_is_still_saved(make: Make) -> None:
    store = make(1)
    ann, bob = sign_in(store, "Ann"), sign_in(store, "Bob")
    mine = take(store, ann, 1, 60, now=1000.0)
    assert take(store, bob, 1, 60, now=1059.0) == []
    assert [w.item for w in take(store, bob, 1, 60, now=1061.0)] == [mine[0].item]
    assert take(store, ann, 1, 60, now=1062.0) == []
    assert submit(store, ann, Answer("late-0001", mine[0].item, "ranking", [1, 2, 3])) == "saved"
    saved = next(iter(rankings(store)))
    assert [saved.completions[i] for i in saved.shown] == mine[0].answers, "in the order that was shown"
    assert submit(store, bob, Answer("bob-00001", mine[0].item, "ranking", [1, 2, 3])) == "saved"
    assert len(list(rankings(store))) == 2


def test_a_share_of_items_goes_to_two_people_and_to_no_third(make: Make) -> None:
    store = make(4, overlap=0.5)
    people = [sign_in(store, name) for name in ("Ann", "Bob", "Cy")]
    taken = Counter(w.item for who in people for w in take(store, who, 4, 60))
    assert sorted(taken.values()) == [1, 1, 2, 2]
    assert totals(store)["shared"] == 2


def test_orders_are_shuffled_for_each_person_and_repeatable(make: Make) -> None:
    store = make(12, overlap=1.0)
    ann, bob = sign_in(store, "Ann"), sign_in(store, "Bob")
    one, two = take(store, ann, 12, 60), take(store, bob, 12, 60)
    assert [w.item for w in one] == [w.item for w in two]
    assert sum(a.answers != b.answers for a, b in zip(one, two, strict=True)) > 6
    assert store.seed == 7


def test_an_answer_is_saved_once_whatever_its_copies(make: Make) -> None:
    store = make(2)
    ann = sign_in(store, "Ann")
    work = take(store, ann, 1, 60)[0]
    answer = Answer("copy-0001", work.item, "ranking", [2, 1, None], 12.5)
    assert [submit(store, ann, answer) for _ in range(3)] == ["saved", "known", "known"]
    (saved,) = rankings(store)
    assert [saved.ranks[i] for i in saved.shown] == [2, 1, None]  # type: ignore[index]
    assert (saved.annotator, saved.seconds, saved.item) == ("Ann", 12.5, work.item)
    with pytest.raises(DataError, match="one answer only"):
        submit(store, ann, Answer("copy-0001", work.item, "ranking", [1, 2, None]))
    assert progress(store, ann) == (1, 0, 1)


def test_undo_replaces_and_a_second_window_is_refused_and_recorded(make: Make) -> None:
    store = make(2)
    ann = sign_in(store, "Ann")
    name = take(store, ann, 1, 60)[0].item
    assert submit(store, ann, Answer("first-001", name, "ranking", [1, 2, 3])) == "saved"
    assert submit(store, ann, Answer("second-01", name, "ranking", [3, 2, 1])) == "refused"
    assert submit(store, ann, Answer("second-01", name, "ranking", [3, 2, 1])) == "refused", "its copy as well"
    assert submit(store, ann, Answer("third-001", name, "ranking", [2, 1, 1], replaces="first-001")) == "saved"
    assert [(h["id"], h["ranks"]) for h in history(store, ann, 5)] == [("third-001", [2, 1, 1])]
    assert submit(store, ann, Answer("fourth-01", name, "skip", None, replaces="third-001")) == "saved"
    assert list(rankings(store)) == []
    assert [r.status for r in rankings(store, every=True)] == ["replaced", "refused", "replaced", "current"]
    bob = sign_in(store, "Bob")
    assert name in {w.item for w in take(store, bob, 2, 60)}, "a skipped item goes to somebody else"


@pytest.mark.parametrize(
    ("ranks", "field"),
    [
        ([1, 2], "ranks"), ([1, 2, 3, 4], "ranks"), ([0, 1, 2], "ranks"), ([1, 3, 3], "ranks"), ([2, 2, 3], "ranks"),
        ([None, None, 1], "ranks"), ([None, None, None], "ranks"), (None, "ranks"),
    ],
)  # fmt: skip
def test_ranks_that_contradict_the_item_are_refused_and_nothing_is_saved(
    make: Make, ranks: list[int | None] | None, field: str
) -> None:
    store = make(1)
    ann = sign_in(store, "Ann")
    name = take(store, ann, 1, 60)[0].item
    with pytest.raises(DataError) as caught:
        submit(store, ann, Answer("wrong-001", name, "ranking", ranks))
    assert caught.value.field == field and caught.value.fix
    assert list(rankings(store, every=True)) == []
    assert submit(store, ann, Answer("wrong-001", name, "ranking", [1, 1, 2])) == "saved", "its id is free"


def test_an_unknown_item_and_impossible_seconds_are_refused(make: Make) -> None:
    store = make(1)
    ann = sign_in(store, "Ann")
    with pytest.raises(DataError, match="item of this database"):
        submit(store, ann, Answer("wrong-001", "no such item", "ranking", [1, 2, 3]))
    with pytest.raises(DataError, match="seconds"):
        submit(store, ann, Answer("wrong-001", item(0).item, "ranking", [1, 2, 3], seconds=-1.0))


def test_many_people_at_once_get_every_item_once(make: Make) -> None:
    store = make(60)
    people = [sign_in(store, f"Person {i}") for i in range(12)]
    barrier = threading.Barrier(len(people))

    def rank(who: int) -> list[str]:
        barrier.wait()
        found: list[str] = []
        while work := take(store, who, 2, 600):
            for one in work:
                answer = Answer(f"{who:04}-{len(found):04}", one.item, "ranking", [1, 2, 3])
                assert submit(store, who, answer) == "saved"
                assert submit(store, who, answer) == "known"
                found.append(one.item)
        return found

    with ThreadPoolExecutor(len(people)) as pool:
        ranked = [name for found in pool.map(rank, people) for name in found]
    assert sorted(ranked) == sorted(item(i).item for i in range(60))
    assert sorted(r.item for r in rankings(store)) == sorted(ranked)
    assert totals(store)["closed"] == 60


def test_opening_again_keeps_everything_and_adds_only_new_items(make: Make) -> None:
    store = make(3)
    ann = sign_in(store, "Ann")
    name = take(store, ann, 1, 60)[0].item
    submit(store, ann, Answer("first-001", name, "ranking", [1, 2, 3]))
    again = make(5)
    assert again.secret == store.secret and again.study == store.study
    assert totals(again)["items"] == 5
    assert sign_in(again, " Ann ") == ann
    assert [r.item for r in rankings(again)] == [name]
    other = Item(item(0).item, "another prompt", ["x", "y"])
    with pytest.raises(DataError, match="with other texts"):
        add_items(again, [other])


def test_urls_of_postgresql_get_their_driver() -> None:
    assert url_of("postgresql://labels@db/labels").drivername == "postgresql+psycopg"
    assert url_of("labels.db").drivername == "sqlite"
