"""A chain through the real page: answers are sampled, two people rank them, policies are trained on the rankings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
import tiny_runs
import trainer_runs
from commands import ENVIRONMENT, run_python
from label_server import free_port
from playwright.sync_api import Page, expect

RECIPE = """
output: chain
stages:
  sample:
    policy: base
    prompts: prompts.jsonl
    count: 8
    sampling: {{samples_per_prompt: 3, batch_size: 12, max_new_tokens: 8, stop: length}}
    dtype: float32
    device: cpu
  label: {{data: "${{sample.samples}}", port: {port}, overlap: 0}}
  reward:
    model: base
    data: ${{label.rankings}}
    test_data: ${{label.rankings}}
    probe_excerpts: 0
    batch_size: 4
    lora.rank: 4
    optim.lr: 0.01
    dtype: float32
    device: cpu
  ppo:
    stage: rl
    policy: base
    reward_model: ${{reward.model}}
    prompts: prompts.jsonl
    steps: 2
    sampling: {{batch_size: 4, max_new_tokens: 4, prompt_tokens: null}}
    ppo: {{epochs: 1, mini_batch: 4}}
    lora.rank: 4
    compare: [sparse]
    dtype: float32
    device: cpu
  dpo:
    model: base
    data: ${{label.rankings}}
    steps: 2
    batch_size: 4
    max_length: 64
    lora.rank: 4
    dtype: float32
    device: cpu
"""


def hidden_rule(text: str) -> tuple[int, str]:
    """Return the key by which the simulated people order answers: those with more vowels come first."""
    return -len(re.findall("[aeiou]", text)), text


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    trainer_runs.save_model(tmp_path / "base", None)
    tiny.save_prompts(tmp_path / "prompts.jsonl", 8)
    return tmp_path


def start(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        command = [sys.executable, "-m", "apportion", "run", "recipe.yaml"]
        return subprocess.Popen(command, cwd=folder, env=os.environ | ENVIRONMENT, stdout=output, stderr=output)


def wait_for_page(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"{address}/api/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def rank_items(page: Page, count: int) -> None:
    """Rank `count` items by keyboard, by the hidden rule."""
    expect(page.locator(".card-text")).to_have_count(3)
    first, shown = int(page.locator("#progress-text").inner_text().split()[0]), ""
    for done in range(first, first + count):
        expect(page.locator("#progress-text")).to_contain_text(f"{done} ranked")
        expect(page.locator("#prompt")).not_to_have_text(shown)  # not the item before, which takes no keys any more
        expect(page.locator(".card-text")).to_have_count(3)
        shown = page.locator("#prompt").inner_text()
        texts = page.locator(".card-text").all_inner_texts()
        for letter in [letter for _, letter in sorted((hidden_rule(text), "abc"[i]) for i, text in enumerate(texts))]:
            page.keyboard.press(letter)
        page.keyboard.press("Enter")
    expect(page.locator("#progress-text")).to_contain_text(f"{first + count} ranked")
    expect(page.locator("#connection")).to_contain_text("All saved")


def join(browser: Any, address: str, name: str) -> Page:
    page: Page = browser.new_context(viewport={"width": 1280, "height": 860}).new_page()
    page.set_default_timeout(20000)
    page.goto(address)
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Start").click()
    return page


@contextmanager
def running(chain: Path, port: int) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """Run the recipe of `chain` until its page is there; yield its process, the page's address and the log."""
    address, log = f"http://127.0.0.1:{port}", chain / "chain.log"
    (chain / "recipe.yaml").write_text(RECIPE.format(port=port))
    process = start(chain, log)
    try:
        wait_for_page(address, process, log)
        yield process, address, log
    finally:
        if process.poll() is None:
            process.kill()


def test_a_chain_waits_for_people_and_learns_from_their_rankings(chain: Path, browser: Any) -> None:
    with running(chain, free_port()) as (process, address, log):
        ann, bob = join(browser, address, "Ann"), join(browser, address, "Bob")
        expect(bob.locator(".card-text")).to_have_count(3)  # a page fetches four items, and nobody else gets those
        for page in (ann, bob):
            rank_items(page, 4)
        assert process.wait(timeout=240) == 0, log.read_text()
    text = log.read_text()
    assert f"page     {address}/" in text and "8 rankings" in text, text
    rows = tiny_runs.read_lines(chain / "chain" / "label" / "rankings.jsonl")
    assert len({row["item"] for row in rows}) == len(rows) == 8
    assert {row["annotator"] for row in rows} == {"Ann", "Bob"}
    for row in rows:
        ordered = [text for _, text in sorted(zip(row["ranks"], row["completions"], strict=True))]
        assert [hidden_rule(one)[0] for one in ordered] == sorted(hidden_rule(one)[0] for one in ordered)
    known = json.loads((chain / "chain" / "status.json").read_text())
    assert known["status"] == "finished" and list(known["stages"]) == ["sample", "label", "reward", "ppo", "dpo"]
    for name in ("reward", "ppo", "dpo"):
        assert (chain / "chain" / name / "final" / "config.json").is_file()
    again = run_python("-m", "apportion", "run", "recipe.yaml", cwd=chain)
    assert again.code == 0 and again.err.count("finished before") == 5


def test_a_label_stage_that_is_stopped_keeps_its_rankings_and_goes_on(chain: Path, browser: Any) -> None:
    port = free_port()
    with running(chain, port) as (process, address, log):
        rank_items(join(browser, address, "Ann"), 2)
        process.terminate()
        assert process.wait(timeout=60) != 0
    assert "2 of 8 items ranked" in log.read_text() and not (chain / "chain" / "reward").exists()
    with running(chain, port) as (process, address, log):
        rank_items(join(browser, address, "Ann"), 6)
        assert process.wait(timeout=240) == 0, log.read_text()
    rows = tiny_runs.read_lines(chain / "chain" / "label" / "rankings.jsonl")
    assert len({row["item"] for row in rows}) == len(rows) == 8
