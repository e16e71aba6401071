"""Many annotators at once on the page's server: no ranking lost or doubled, and how long a request takes.

    python -m benchmarks.label_load --seconds 120 --annotators 50 --json

Each simulated annotator asks for items as the page does, thinks for 1 to 3 seconds, ranks; one answer in 20 is sent
twice at the same moment, one in 20 is undone and replaced. The server is `apportion label` on SQLite, and on PostgreSQL
15 where Debian's package is installed (its own user, a temporary folder). Exit code 1 where an acknowledged ranking is
not exported once, two people ranked the same item by accident, or the 95th percentile reaches 200 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import select

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
import postgres
from label_server import HEADERS, LabelServer, quality, write_samples

from apportion.label.store import Store, open_store
from apportion.label.store.reading import rankings
from apportion.label.store.schema import items

LIMIT_MS = 200.0  # 95th percentile
SHARED = 0.2  # of the items are ranked by two people
THINK = (1.0, 3.0)  # seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run on each database; return 0 where nothing was lost or doubled and requests were quick."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--annotators", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"], choices=["sqlite", "postgresql"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    found = {}
    for name in given.databases:
        reason = postgres.absent() if name == "postgresql" else None
        found[name] = {"skipped": reason} if reason else measure(name, given.annotators, given.seconds, given.seed)
        if not given.json:
            print(line(name, found[name]), flush=True)
    if given.json:
        print(json.dumps(found, indent=2))
    return int(any(not one.get("good", True) for one in found.values()))


def measure(database: str, annotators: int, seconds: float, seed: int) -> dict[str, Any]:
    """Return the figures of one database."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="apportion-label-")))
        url = str(folder / "labels.db") if database == "sqlite" else stack.enter_context(postgres.server())
        data = write_samples(folder / "samples.jsonl", int(annotators * seconds / THINK[0]) + 4 * annotators, 4)
        server = LabelServer(folder, "--data", data, "--database", url, "--overlap", SHARED)
        stack.enter_context(server)
        people = [Annotator(server.address, f"Person {i}", seed + i) for i in range(annotators)]
        asyncio.run(run_all(people, seconds))
        store = open_store(url)
        stack.callback(store.close)
        return figures(people, store, seconds)


class Annotator:
    """One person's browser: what it sent, what was acknowledged, and how long each request took (ms)."""

    def __init__(self, address: str, name: str, seed: int) -> None:
        self.address, self.name = address, name
        self.random = random.Random(seed)
        self.milliseconds: dict[str, list[float]] = {"/api/work": [], "/api/answers": []}
        self.acknowledged: dict[str, tuple[str, list[int]]] = {}  # item -> (id, ranks in the order shown)
        self.failed = 0

    async def run(self, until: float) -> None:
        """Rank until `until` (monotonic seconds)."""
        limits = httpx.Limits(max_connections=4, max_keepalive_connections=4)
        async with httpx.AsyncClient(base_url=self.address, headers=HEADERS, timeout=60, limits=limits) as http:
            await http.post("/api/session", json={"name": self.name})
            await asyncio.sleep(self.random.uniform(0, THINK[1]))
            todo: list[dict[str, Any]] = []
            while time.monotonic() < until:
                if len(todo) < 2:
                    reply = await self.post(http, "/api/work", {"count": 4, "have": [one["item"] for one in todo]})
                    known = {one["item"]: one for one in todo}
                    todo = [known.get(one["item"], one) for one in (reply or {}).get("items", [])]
                    if not todo:
                        await asyncio.sleep(1)
                        continue
                await asyncio.sleep(self.random.uniform(*THINK))
                await self.rank(http, todo.pop(0))

    async def rank(self, http: httpx.AsyncClient, item: dict[str, Any]) -> None:
        """Rank an item; sometimes twice at the same moment, sometimes with a correction."""
        ranks = [quality(text) for text in item["answers"]]
        body = {"id": f"{self.random.getrandbits(96):024x}", "item": item["item"], "ranks": ranks, "seconds": 2.0}
        copies = 2 if self.random.random() < 0.05 else 1
        if any(await asyncio.gather(*(self.post(http, "/api/answers", body) for _ in range(copies)))):
            self.acknowledged[item["item"]] = (body["id"], ranks)
        if self.random.random() < 0.05:
            other = {**body, "id": f"{self.random.getrandbits(96):024x}", "ranks": ranks[::-1], "replaces": body["id"]}
            if await self.post(http, "/api/answers", other):
                self.acknowledged[item["item"]] = (other["id"], ranks[::-1])

    async def post(self, http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """Return the reply, None for a failed request."""
        began = time.perf_counter()
        try:
            response = await http.post(path, json=body)
        except httpx.HTTPError:
            self.failed += 1
            return None
        self.milliseconds[path].append(1000 * (time.perf_counter() - began))
        if response.status_code != 200:
            self.failed += 1
            return None
        found: dict[str, Any] = response.json()
        return found


async def run_all(people: Sequence[Annotator], seconds: float) -> None:
    """Run all annotators at once for `seconds`."""
    until = time.monotonic() + seconds
    await asyncio.gather(*(person.run(until) for person in people))


def figures(people: Sequence[Annotator], store: Store, seconds: float) -> dict[str, Any]:
    """Return the figures: what was lost or doubled, and percentiles of the requests."""
    exported = [(one.annotator, one.item, [(one.ranks or [])[i] for i in one.shown]) for one in rankings(store)]
    pairs = Counter((name, item) for name, item, _ in exported)
    given = {(name, item): ranks for name, item, ranks in exported}
    sent = {(p.name, item): ranks for p in people for item, (_, ranks) in p.acknowledged.items()}
    per_item = Counter(item for _, item in pairs)
    times = {path: sorted(t for p in people for t in p.milliseconds[path]) for path in people[0].milliseconds}
    every = sorted(t for listed in times.values() for t in listed)
    found = {
        "annotators": len(people),
        "seconds": seconds,
        "rankings": len(sent),
        "requests": len(every),
        "requests_a_second": len(every) / seconds,
        "failed": sum(p.failed for p in people),
        "lost": sum(given.get(key) != ranks for key, ranks in sent.items()),
        "doubled": sum(count - 1 for count in pairs.values()),
        "over_ranked": sum(per_item[item] > wanted for item, wanted in people_of(store).items()),
        "p50_ms": percentile(every, 0.5),
        "p95_ms": percentile(every, 0.95),
        "p99_ms": percentile(every, 0.99),
        "p95_ms_by_path": {path: percentile(listed, 0.95) for path, listed in times.items()},
    }
    whole = not any(found[name] for name in ("failed", "lost", "doubled", "over_ranked"))
    return found | {"good": whole and found["p95_ms"] < LIMIT_MS}


def people_of(store: Store) -> dict[str, int]:
    """Return {item: the number of people who are to rank it}."""
    with store.reading() as connection:
        return {row.item: row.wanted for row in connection.execute(select(items.c.item, items.c.wanted))}


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the sorted values lie."""
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1) if ordered else 0.0


def line(name: str, found: dict[str, Any]) -> str:
    """Return the figures as one line."""
    if "skipped" in found:
        return f"{name:<11} skipped: {found['skipped']}"
    return (
        f"{name:<11} {found['rankings']} rankings by {found['annotators']} people in {found['seconds']:g} s: "
        f"{found['lost']} lost, {found['doubled']} doubled, {found['over_ranked']} items ranked by too many people, "
        f"{found['failed']} failed; {found['requests']} requests, "
        f"p50 {found['p50_ms']} ms, p95 {found['p95_ms']} ms, p99 {found['p99_ms']} ms"
    )


if __name__ == "__main__":
    sys.exit(main())
