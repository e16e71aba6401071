"""The page of `apportion label` in a real browser: people rank by keyboard, drag and touch; the server is killed."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import axe
import pytest
from commands import Server
from label_server import LabelServer, quality, write_samples
from playwright.sync_api import Page, Route, expect

from apportion.label.results.figures import results
from apportion.label.store import open_store

ITEMS = 20
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
DESKTOP = {"viewport": {"width": 1280, "height": 860}}
Join = Callable[..., Page]
PLANTED = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script> & <b>bold</b>'


@pytest.fixture
def join(browser: Any) -> Iterator[Join]:
    """A function (server, name, **options) -> the page of an annotator who signed in; it may reach the server only."""
    contexts: list[Any] = []
    complaints: list[str] = []

    def open_(server: LabelServer, name: str, token: str = "", **options: Any) -> Page:
        context = browser.new_context(**(options or DESKTOP))
        contexts.append(context)
        page: Page = context.new_page()
        page.set_default_timeout(20000)
        page.on("request", lambda r: None if r.url.startswith(server.address) else complaints.append(r.url))
        page.on("pageerror", lambda error: complaints.append(f"uncaught: {error}"))
        page.goto(server.address + "/" + (f"#token={token}" if token else ""))
        page.get_by_label("Your name").fill(name)
        page.get_by_role("button", name="Start").click()
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., LabelServer]]:
    """A function (*arguments, items) -> a server on samples of its own."""
    started: list[LabelServer] = []

    def start(*arguments: object, items: int = 6, samples: Path | None = None, **environment: str) -> LabelServer:
        data = samples or write_samples(tmp_path / "samples.jsonl", items)
        server = LabelServer(tmp_path, "--data", data, "--database", tmp_path / "labels.db", *arguments, **environment)
        started.append(server.start())
        return server

    yield start
    for server in started:
        server.kill()


def order(page: Page) -> list[str]:
    """Return the letters of the current item from the best answer to the worst."""
    texts = page.locator(".card-text").all_inner_texts()
    return [letter for _, letter in sorted((quality(text), "ABCDEFGHIJKL"[i]) for i, text in enumerate(texts))]


def number(page: Page) -> int:
    """Return the number of the current item's prompt."""
    return int(page.locator("#prompt").inner_text().split(":")[0].split()[1])


def by_keyboard(page: Page, letters: list[str]) -> None:
    for letter in letters:
        page.keyboard.press(letter.lower())
    page.keyboard.press("Enter")


def drag(page: Page, letter: str, where: str, share: float = 0.5) -> None:
    """Drag a letter of the board onto the row `where`, at `share` of its height."""
    chip = page.locator("#places .chip", has_text=letter).bounding_box()
    row = page.locator(f'[data-drop="{where}"]').bounding_box()
    assert chip and row
    page.mouse.move(chip["x"] + 20, chip["y"] + 20)
    page.mouse.down()
    page.mouse.move(row["x"] + row["width"] / 2, row["y"] + row["height"] * share, steps=4)
    page.mouse.up()


def by_drag(page: Page, letters: list[str]) -> None:
    for letter in letters:
        drag(page, letter, "end")
    page.get_by_role("button", name="Save and next").click()


def export(light: Server, folder: Path) -> list[dict[str, Any]]:
    """Run `apportion label export` and return its rows."""
    done = light.run("label", "export", "--database", "labels.db", "--output", "rankings.jsonl", cwd=folder)
    assert done.code == 0, done.err
    return [json.loads(line) for line in (folder / "rankings.jsonl").read_text(encoding="utf-8").splitlines()]


def test_two_people_rank_while_the_server_is_killed_twice(
    served: Callable[..., LabelServer], join: Join, light: Server, tmp_path: Path
) -> None:
    """Every ranking is exported once, and agreement is the value computed by hand.

    Both rank 20 items of three answers. On even items they agree, on odd ones the second person swaps places 2 and 3.
    Each rank is given 40 times, n = 120. Ordinal distances: (1,2) and (2,3) 40² = 1600, (1,3) 80² = 6400. Observed:
    10 items · 2 answers · 2 · 1600 / 120 = 533.33; expected: 2 · 1600 · (1600 + 1600 + 6400) / (120 · 119) = 2151.26.
    alpha = 1 − 533.33 / 2151.26 = 0.75208; tau is 1 on ten items and 1/3 on ten: 2/3.
    """
    server = served("--overlap", "1.0", items=ITEMS)
    ann, bob = join(server, "Ann"), join(server, "Bob")
    for i in range(ITEMS):
        if i in (7, 14):
            server.kill()
        for page, rank in ((ann, by_keyboard), (bob, by_drag)):
            expect(page.locator("#prompt")).to_contain_text(f"Question {i}:")
            letters = order(page)
            if page is bob and i % 2:
                letters = [letters[0], letters[2], letters[1]]
            rank(page, letters)
        if i in (8, 15):
            expect(ann.locator("#connection")).to_contain_text("Offline · 2 kept here")
            server.start()
    for page in (ann, bob):
        expect(page.locator("#waiting-title")).to_have_text("All done", timeout=60000)
        expect(page.locator("#connection")).to_contain_text("All saved")
        expect(page.locator("#progress-text")).to_contain_text("20 ranked · 0 left")
    server.kill()
    rows = export(light, tmp_path)
    assert Counter(row["annotator"] for row in rows) == {"Ann": ITEMS, "Bob": ITEMS}
    assert len({(row["annotator"], row["item"]) for row in rows}) == 2 * ITEMS
    for row in rows:
        swapped = row["annotator"] == "Bob" and int(row["prompt"].split(":")[0].split()[1]) % 2
        expected = [quality(text) for text in row["completions"]]
        assert row["ranks"] == ([(1, 3, 2)[q - 1] for q in expected] if swapped else expected)
        assert row["seconds"] >= 0 and sorted(row["shown"]) == [0, 1, 2]
    store = open_store(str(tmp_path / "labels.db"))
    found = results(store)["agreement"]
    store.close()
    assert found["alpha_ranks"] == pytest.approx(0.752083, abs=1e-6)
    assert found["tau"]["mean"] == pytest.approx(2 / 3)


def test_offline_in_the_middle_of_a_click_nothing_is_lost_or_doubled(
    served: Callable[..., LabelServer], join: Join, light: Server, tmp_path: Path
) -> None:
    server = served(items=4)
    page = join(server, "Ann")
    expect(page.locator("#prompt")).to_contain_text("Question 0:")
    lost: list[str] = []

    def lose_the_reply(route: Route) -> None:
        route.fetch()  # the server has saved it
        lost.append(route.request.post_data or "")
        route.abort("internetdisconnected") if len(lost) == 1 else route.continue_()

    page.route("**/api/answers", lose_the_reply)
    letters = order(page)
    for letter in letters:
        page.keyboard.press(letter)
    save = page.get_by_role("button", name="Save and next").bounding_box()
    assert save
    page.mouse.move(save["x"] + 9, save["y"] + 9)
    page.mouse.down()
    page.context.set_offline(True)
    page.mouse.up()
    expect(page.locator("#prompt")).to_contain_text("Question 1:")
    expect(page.locator("#connection")).to_contain_text("Offline · 1 kept here")
    by_keyboard(page, order(page))
    expect(page.locator("#connection")).to_contain_text("Offline · 2 kept here")
    page.context.set_offline(False)
    expect(page.locator("#connection")).to_contain_text("All saved")
    assert len(lost) >= 3 and len({json.loads(body)["id"] for body in lost}) == 2
    rows = export(light, tmp_path)
    assert [row["ranks"] for row in rows] == [[quality(text) for text in row["completions"]] for row in rows]
    assert len(rows) == 2


def test_undo_within_an_item_and_back_to_the_one_before_also_after_a_reload(
    served: Callable[..., LabelServer], join: Join, light: Server, tmp_path: Path
) -> None:
    server = served(items=3)
    page = join(server, "Ann")
    expect(page.locator("#prompt")).to_contain_text("Question 0:")
    page.keyboard.press("a")
    page.keyboard.press("=")
    page.keyboard.press("b")
    expect(page.locator('[data-drop="group:1"] .chip')).to_have_count(2)
    page.keyboard.press("Backspace")
    expect(page.locator('[data-drop="group:1"] .chip')).to_have_count(1)
    page.reload()
    expect(page.locator('[data-drop="group:1"] .chip')).to_have_text("A")  # the draft was kept
    by_keyboard(page, ["b", "c"])
    expect(page.locator("#prompt")).to_contain_text("Question 1:")
    page.keyboard.press("s")
    expect(page.locator("#prompt")).to_contain_text("Question 2:")
    expect(page.locator("#connection")).to_contain_text("All saved")
    page.reload()
    expect(page.locator("#prompt")).to_contain_text("Question 2:")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#prompt")).to_contain_text("Question 1:")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#prompt")).to_contain_text("Question 0:")
    expect(page.locator(".card-place").first).to_have_text("1st")
    page.locator(".card").nth(2).get_by_label("1st place").check(force=True)
    page.locator(".card").nth(0).get_by_label("Cannot judge").check(force=True)
    page.get_by_role("button", name="Save and next").click()
    expect(page.locator("#prompt")).to_contain_text("Question 2:")
    expect(page.locator("#connection")).to_contain_text("All saved")
    (row,) = export(light, tmp_path)
    assert [row["ranks"][i] for i in row["shown"]] == [None, 2, 1]
    done = light.run("label", "export", "--database", "labels.db", "--replaced", "true", cwd=tmp_path)
    assert done.code == 0
    rows = [json.loads(line) for line in (tmp_path / "rankings.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["replaced", "current"]


def test_drags_tie_insert_and_take_out_and_arrows_move(served: Callable[..., LabelServer], join: Join) -> None:
    page = join(served(), "Ann")
    expect(page.locator(".card")).to_have_count(3)
    places = lambda: page.locator(".card-place").all_inner_texts()  # noqa: E731
    drag(page, "A", "end")
    drag(page, "B", "group:1")
    assert places() == ["1st, tied with B", "1st, tied with A", "not placed"]
    drag(page, "C", "group:1", share=0.08)
    assert places() == ["2nd, tied with B", "2nd, tied with A", "1st"]
    drag(page, "A", "none")
    assert places() == ["cannot judge", "2nd", "1st"]
    drag(page, "C", "group:2", share=0.95)
    assert places() == ["cannot judge", "1st", "2nd"]
    page.locator("#places .chip", has_text="C").focus()
    page.keyboard.press("ArrowUp")
    assert places() == ["cannot judge", "1st, tied with C", "1st, tied with B"]
    page.keyboard.press("ArrowUp")
    assert places() == ["cannot judge", "2nd", "1st"]
    expect(page.locator("#announcer")).to_contain_text("C 1st")
    box = page.locator("#places .chip", has_text="B").bounding_box()
    assert box
    page.mouse.move(box["x"] + 9, box["y"] + 9)
    page.mouse.down()
    page.mouse.move(box["x"] + 9, box["y"] - 60, steps=3)
    page.keyboard.press("Escape")
    page.mouse.up()
    assert places() == ["cannot judge", "2nd", "1st"], "Escape ends a drag"


def test_a_finger_drags_on_a_phone(served: Callable[..., LabelServer], join: Join) -> None:
    page = join(served(), "Ann", **PHONE)
    expect(page.locator(".card")).to_have_count(3)
    touch = page.context.new_cdp_session(page)

    def swipe(letter: str, where: str) -> None:
        chip = page.locator("#places .chip", has_text=letter).bounding_box()
        row = page.locator(f'[data-drop="{where}"]').bounding_box()
        assert chip and row
        start = (chip["x"] + 20, chip["y"] + 20)
        end = (row["x"] + row["width"] / 2, row["y"] + row["height"] / 2)
        points = [(start[0] + (end[0] - start[0]) * t / 5, start[1] + (end[1] - start[1]) * t / 5) for t in range(6)]
        send = lambda kind, spots: touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": spots})  # noqa: E731
        send("touchStart", [{"x": start[0], "y": start[1]}])
        for x, y in points[1:]:
            send("touchMove", [{"x": x, "y": y}])
        send("touchEnd", [])

    for letter in order(page):
        swipe(letter, "end")
    expect(page.locator("#save")).to_have_attribute("aria-disabled", "false")
    assert [quality(text) for text in page.locator(".card-text").all_inner_texts()] == [
        int(place[0]) for place in page.locator(".card-place").all_inner_texts()
    ]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    small = page.locator("button:visible, label:visible").evaluate_all(
        "nodes => nodes.map(n => [n.textContent, n.getBoundingClientRect()])"
        ".filter(([, r]) => r.height < 43.5 || r.width < 43.5).map(([text]) => text)"
    )
    assert small == [], "targets of at least 44 pixels"
    page.get_by_role("button", name="Save and next").tap()
    expect(page.locator("#progress-text")).to_contain_text("1 ranked")


def test_planted_markup_stays_text_and_nothing_leaves_the_page(
    served: Callable[..., LabelServer], join: Join, tmp_path: Path
) -> None:
    prompt = [{"role": "system", "content": PLANTED}, {"role": "user", "content": [{"type": "text", "text": PLANTED}]}]
    rows = [{"prompt": prompt, "completions": [PLANTED, "", [{"role": "assistant", "content": PLANTED}]]}]
    samples = tmp_path / "planted.jsonl"
    samples.write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    guidelines = tmp_path / "guidelines.md"
    guidelines.write_text(f"# Rules\n{PLANTED}", encoding="utf-8")
    server = served("--guidelines", guidelines, "--title", PLANTED, samples=samples)
    page = join(server, PLANTED[:60])
    expect(page.locator("#guidelines-text")).to_have_text(f"# Rules\n{PLANTED}")
    page.get_by_role("button", name="Close").click()
    expect(page.locator("#prompt .text")).to_have_text([PLANTED, PLANTED])
    assert page.locator(".card-text").all_inner_texts().count(PLANTED) == 1
    by_keyboard(page, ["a", "b", "c"])
    expect(page.locator("#connection")).to_contain_text("All saved")
    page.goto(f"{server.address}/results")
    expect(page.locator("h1")).to_have_text(PLANTED)
    assert page.evaluate("window.pwned") is None
    assert page.locator("img[src=x], b").count() == 0


def test_a_token_opens_the_page_by_its_link_and_a_wrong_one_does_not(
    served: Callable[..., LabelServer], join: Join
) -> None:
    token = "a-token-of-some-length"
    server = served(APPORTION_LABEL_TOKEN=token)
    page = join(server, "Ann", token=token)
    expect(page.locator(".card")).to_have_count(3)
    assert token not in page.url
    wrong = join(server, "Bob", token="another-token-of-length")
    expect(wrong.locator("#sign-in-problem")).to_contain_text("token")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("device", "options"), [("desktop", DESKTOP), ("phone", PHONE)])
def test_axe_finds_no_serious_fault(
    served: Callable[..., LabelServer], browser: Any, tmp_path: Path, device: str, options: Any, scheme: str
) -> None:
    script, reason = axe.script()
    if script is None:
        pytest.skip(reason)
    guidelines = tmp_path / "guidelines.md"
    guidelines.write_text("Rank the most helpful answer first.\n" * 80, encoding="utf-8")
    server = served("--guidelines", guidelines)
    context = browser.new_context(**options, color_scheme=scheme, bypass_csp=True)  # for the checker's own script
    page = context.new_page()
    page.goto(server.address)

    def check(state: str) -> None:
        page.wait_for_timeout(250)  # transitions of colours
        page.evaluate(script)
        found = page.evaluate("axe.run().then(r => r.violations.map(v => [v.impact, v.id, v.nodes.map(n => n.html)]))")
        assert [one for one in found if one[0] in ("serious", "critical")] == [], f"{state}, {device}, {scheme}"

    check("sign in")
    page.get_by_label("Your name").fill("Ann")
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#guidelines-text")).to_be_visible()
    check("guidelines")
    page.get_by_role("button", name="Close").click()
    check("an item")
    page.keyboard.press("b")
    page.keyboard.press("a")
    page.locator(".card").nth(2).evaluate("e => e.scrollIntoView({block: 'center'})")  # a phone's dock may cover it
    page.locator(".card").nth(2).get_by_label("Cannot judge").check(force=True)
    check("a ranking")
    page.locator("#view-side").click()
    check("side by side")
    page.get_by_role("button", name="Save and next").click()
    page.get_by_role("button", name="Undo").click()
    check("changing a ranking")
    page.locator("#open-keys").click()
    check("keys")
    page.goto(f"{server.address}/results")
    check("results")
    context.close()


@pytest.mark.parametrize("width", [360, 390])
def test_every_place_of_the_dock_is_whole_on_a_phone(
    served: Callable[..., LabelServer], join: Join, tmp_path: Path, width: int
) -> None:
    samples = write_samples(tmp_path / "eight.jsonl", 2, answers=8)
    page = join(served(samples=samples), "Cy", **PHONE | {"viewport": {"width": width, "height": 780}})
    expect(page.locator(".card")).to_have_count(8)
    for keys in ("", "ba", "0"):  # nothing placed, two placed, one that cannot be judged
        for key in keys:
            page.keyboard.press(key)
        for place in [*page.locator("#places .place").all(), *page.locator("#board button").all()]:
            box = place.bounding_box()
            assert box and box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= 780
            assert place.evaluate("e => e.scrollWidth <= e.clientWidth + 1")
        name = page.locator('[data-drop="none"] .place-name').bounding_box()
        assert name and name["height"] < 30  # one line
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    last, dock = page.locator(".card").last.bounding_box(), page.locator("#board").bounding_box()
    assert last and dock and last["y"] + last["height"] <= dock["y"]
    if folder := os.environ.get("APPORTION_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"label-{width}.png")


@pytest.mark.skipif(
    "APPORTION_SCREENSHOTS" not in os.environ, reason="writes docs/images; APPORTION_SCREENSHOTS=FOLDER"
)
def test_screenshots(served: Callable[..., LabelServer], join: Join, tmp_path: Path) -> None:
    """Write the pictures of docs/label.md: a list on a desktop, side by side in the dark, a phone."""
    folder = Path(os.environ["APPORTION_SCREENSHOTS"])
    samples = Path(__file__).parents[2] / "examples" / "answers_to_rank.jsonl"
    server = served("--overlap", "1.0", "--overlap_annotators", "3", samples=samples)
    desk = join(server, "Ann")
    expect(desk.locator(".card")).to_have_count(4)
    for key in ("c", "a", "=", "d"):
        desk.keyboard.press(key)
    desk.mouse.move(700, 80)
    desk.wait_for_timeout(300)
    desk.screenshot(path=folder / "label-list.png")
    dark = join(server, "Bob", viewport={"width": 1280, "height": 720}, color_scheme="dark")
    expect(dark.locator(".card")).to_have_count(4)
    for key in ("v", "b", "a"):
        dark.keyboard.press(key)
    dark.mouse.move(700, 80)
    dark.wait_for_timeout(300)
    dark.screenshot(path=folder / "label-side.png")
    phone = join(server, "Cy", **PHONE)
    expect(phone.locator(".card")).to_have_count(4)
    for key in ("b", "a"):
        phone.keyboard.press(key)
    phone.wait_for_timeout(300)
    phone.screenshot(path=folder / "label-phone.png")
    sizes = [(folder / f"label-{name}.png").stat().st_size for name in ("list", "side", "phone")]
    assert min(sizes) > 10_000  # an empty page has a few hundred bytes
