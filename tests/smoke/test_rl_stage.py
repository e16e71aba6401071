"""`apportion rl` on tiny real models: every switch for two steps, and its logs recomputed from what it saved."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from apportion.cli.main import main
from apportion.credit import METHODS
from apportion.errors import ModelError
from apportion.models.loading import has_bfloat16
from apportion.stages.method import build_method
from apportion.stages.rl.learner import make_learner
from apportion.stages.rl.train import train

FIELDS = {
    "step", "row", "prompt", "text", "tokens", "prompt_ids", "response_ids", "ended", "score", "raw_score", "credit",
    "kl", "reward", "advantage", "value", "logprob", "alpha", "methods",
}  # fmt: skip
PER_TOKEN = ("tokens", "credit", "kl", "reward", "advantage", "value", "logprob", "alpha")
ENDING = {"sampling.stop": "eos"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


def finished(world: Path, output: Path, **changes: Any) -> Path:
    """Run the command in this process and return its run folder."""
    assert main(["rl", *tiny_runs.flags(world, output, **changes)]) == 0
    return output


def check_folder(path: Path, steps: int = 2) -> list[dict[str, Any]]:
    """Check everything that a finished run leaves, and return its logged rollouts."""
    assert yaml.safe_load((path / "status.json").read_text())["status"] == "finished"
    names = {"README.md", "config.yaml", "status.json", "progress.json", "metrics.jsonl", "rollouts.jsonl", "final"}
    assert {p.name for p in path.iterdir()} - {"checkpoints"} == names
    progress = json.loads((path / "progress.json").read_text())
    assert (progress["step"], progress["steps"], progress["seconds_left"]) == (steps, steps, 0.0)
    metrics = tiny_runs.read_lines(path / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, steps + 1))
    assert {"objective/scores", "objective/kl", "policy/lr", "time/total", "memory/rss_mb"} <= set(metrics[0])
    records = tiny_runs.read_lines(path / "rollouts.jsonl")
    assert len(records) == 4 * steps
    for record in records:
        assert set(record) == FIELDS
        n = len(record["response_ids"])
        assert all(len(record[name]) == n for name in PER_TOKEN) and n > 0
        assert all(len(values) == n for values in record["methods"].values())
    model = AutoModelForCausalLM.from_pretrained(path / "final", dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(path / "final")
    assert tokens.pad_token_id == model.config.pad_token_id != tokens.eos_token_id
    written = model.generate(**tokens("This film", return_tensors="pt"), max_new_tokens=3, min_new_tokens=3)
    assert written.shape[1] >= 4 and torch.isfinite(model.get_output_embeddings().weight).all()
    card = (path / "final" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and "## Limits" in card and "samples_per_prompt" in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["apportion", "rlhf", "reinforcement-learning"]
    return records


KINDS = list(itertools.product([4, 0], ["shared", "separate", "reward"], ["length", "eos"]))
PAIRS = (0, 3, 5, 7, 8, 10)  # of `KINDS`: every rank, value model and stop with every other


@pytest.mark.parametrize(
    ("rank", "value_model", "stop"),
    [kind if i in PAIRS else pytest.param(*kind, marks=pytest.mark.long) for i, kind in enumerate(KINDS)],
)
def test_two_steps_of_every_kind_of_training(
    world: Path, tmp_path: Path, rank: int, value_model: str, stop: str
) -> None:
    changes = {"lora.rank": rank, "ppo.value_model": value_model, "sampling.stop": stop, "policy": world / "ending"}
    records = check_folder(finished(world, tmp_path / "run", **changes))
    lengths = {len(record["response_ids"]) for record in records}
    assert lengths == {5} if stop == "length" else len(lengths) > 1
    for record in records:
        assert record["ended"] == (record["response_ids"][-1] == tiny_runs.EOS)
    start, final = tiny_runs.weights(world / "ending"), tiny_runs.weights(tmp_path / "run" / "final")
    assert start.keys() == final.keys()
    moved = {name for name in start if not torch.equal(start[name], final[name])}
    assert moved == ({name for name in start if "self_attn" in name} if rank else set(start))


PENALTIES = ("kl_penalty", "{kl_penalty: {coef: 0.2, target: 1.0, horizon: 30}}")
KEEPING = sorted(name for name, make in METHODS.items() if make().keeps_return)


@pytest.mark.parametrize(
    ("credit", "penalty"),
    [
        pytest.param(credit, penalty, marks=[] if (i + j) % 2 == 0 else pytest.mark.long)  # alternately
        for i, credit in enumerate(KEEPING)
        for j, penalty in enumerate(PENALTIES)
    ],
)
def test_two_steps_with_every_credit_and_penalty(world: Path, tmp_path: Path, credit: str, penalty: str) -> None:
    run = finished(world, tmp_path / "run", credit=f"[{credit}, {penalty}]", compare=f"[attention, {credit}]")
    for record in check_folder(run):
        assert sum(record["credit"]) == pytest.approx(record["score"], abs=1e-5 * max(1, abs(record["score"])))
        assert record["credit"] == pytest.approx(record["methods"][credit], abs=1e-5)
    kappas = [row["kl/coef"] for row in tiny_runs.read_lines(run / "metrics.jsonl")]
    assert kappas == pytest.approx([0.05, 0.05]) if penalty == "kl_penalty" else kappas[0] != kappas[1]


@pytest.mark.parametrize("rank", [4, 0])
def test_two_steps_in_16_bit(world: Path, tmp_path: Path, rank: int) -> None:
    if not has_bfloat16(torch.device("cpu")):
        pytest.skip("this processor has no bfloat16 products")
    changes = {"dtype": "bfloat16", "reward_dtype": "bfloat16", "lora.rank": rank, "log_rollouts": 4}
    check_folder(finished(world, tmp_path / "run", **changes))
    gaps = [row["sampling/logprob_gap"] for row in tiny_runs.read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert all(0 <= gap < 0.1 for gap in gaps)
    stored = tiny_runs.weights(tmp_path / "run" / "final")
    assert {t.dtype for t in stored.values()} == {torch.float32}


@torch.no_grad()
def credit_by_hand(folder: Path, record: dict[str, Any], mix: float) -> tuple[float, list[float], list[float]]:
    """Return (score, α, credit) of one logged rollout from the saved reward model's eager attention, head by head."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    ids, first = record["prompt_ids"] + record["response_ids"], len(record["prompt_ids"])
    out = model(torch.tensor([ids]), output_attentions=True)
    score = float(out.logits[0, 1] - out.logits[0, 0])
    matrix = out.attentions[-1][0].double()  # (H,K,K) of the last layer
    mean = [sum(float(matrix[h, -1, k]) for h in range(len(matrix))) / len(matrix) for k in range(first, len(ids))]
    alpha = [a / sum(mean) for a in mean]
    credit = [mix * a * score for a in alpha]
    credit[-1] += (1 - mix) * score
    return score, alpha, credit


@pytest.mark.parametrize(("mix", "rank"), [(0.8, 4), (0.3, 0)])
def test_logged_credit_is_recomputed_from_the_saved_reward_model(
    world: Path, tmp_path: Path, mix: float, rank: int
) -> None:
    """All 8 logged rollouts of a run with ragged prompts and responses, one at a time, without our library."""
    changes = {"credit": "attention", "credit.mix": mix, "lora.rank": rank, "policy": world / "ending", **ENDING}
    records = check_folder(finished(world, tmp_path / "run", **changes))
    assert len(records) == 8 and len({len(r["response_ids"]) for r in records}) > 1
    for record in records:
        score, alpha, credit = credit_by_hand(world / "reward", record, mix)
        assert record["score"] == record["raw_score"] == pytest.approx(score, abs=1e-5)
        assert record["alpha"] == pytest.approx(alpha, abs=1e-5)
        assert record["credit"] == pytest.approx(credit, abs=1e-5)
    assert max(len(set(record["alpha"])) for record in records) > 2


@pytest.mark.parametrize(
    ("reading", "compare"),
    [
        ("{layers: 0}", "[]"),
        ("{heads: max}", "[attention]"),
        ("{rollout: true}", "[]"),
        ("{rollout: true}", "[attention]"),
    ],
)
def test_logged_alpha_is_the_reading_that_the_run_used(world: Path, tmp_path: Path, reading: str, compare: str) -> None:
    run = finished(world, tmp_path / "run", credit=f"{{attention: {reading}}}", compare=compare)
    for record in tiny_runs.read_lines(run / "rollouts.jsonl"):
        expected = [0.8 * a * record["score"] for a in record["alpha"]]
        expected[-1] += 0.2 * record["score"]
        assert record["credit"] == pytest.approx(expected, abs=1e-5)


COEF = """
import torch
from apportion import Credit

def mine(*, coef=3.0):
    state = {"coef": torch.tensor(coef)}
    return Credit(lambda: dict(state), lambda r, x, s: (torch.where(r.mask, x + 1, 0), s), frozenset(), False, True)
"""


def test_a_user_defined_coefficient_is_no_kl_penalty(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "coef_credit.py").write_text(COEF)
    monkeypatch.syspath_prepend(tmp_path)
    for name, chain in (("alone", "[coef_credit:mine]"), ("both", "[coef_credit:mine, {kl_penalty: {coef: 0.25}}]")):
        run = finished(world, tmp_path / name, credit=chain)
        metrics = tiny_runs.read_lines(run / "metrics.jsonl")
        assert [row.get("kl/coef") for row in metrics] == ([None] * 2 if name == "alone" else [0.25] * 2)
        for record in tiny_runs.read_lines(run / "rollouts.jsonl"):
            expected = [1.0] * len(record["tokens"])
            expected[-1] += record["score"]
            assert record["credit"] == pytest.approx(expected, abs=1e-5)


def test_logged_credit_adds_up_to_the_score_of_long_responses(world: Path, tmp_path: Path) -> None:
    """100 tokens each: what is rounded in the log must not add up to a difference."""
    changes = {"sampling.max_new_tokens": 100, "log_rollouts": 6, "scores.clip": 2.5}
    run = finished(world, tmp_path / "run", **changes)
    for record in tiny_runs.read_lines(run / "rollouts.jsonl"):
        bound = 1e-5 * max(1.0, abs(record["score"]))
        assert len(record["credit"]) == 100 and abs(record["score"]) <= 2.5
        for values in (record["credit"], *record["methods"].values()):
            assert abs(sum(values) - record["score"]) <= bound
        assert abs(sum(record["alpha"]) - 1.0) <= 1e-5


@pytest.mark.parametrize("rank", [4, pytest.param(0, marks=pytest.mark.long)])
def test_without_mix_a_run_is_the_sparse_run_bit_for_bit(world: Path, tmp_path: Path, rank: int) -> None:
    common = {"lora.rank": rank, "policy": world / "ending", "steps": 3, **ENDING}
    sparse = finished(world, tmp_path / "sparse", credit="sparse", **common)
    for name in ("attention", "uniform", "policy_attention"):
        run = finished(world, tmp_path / name, credit=f"{{{name}: {{mix: 0.0}}}}", **common)
        one, two = (tiny_runs.read_lines(p / "rollouts.jsonl") for p in (sparse, run))
        assert [r["reward"] for r in one] == [r["reward"] for r in two]
        assert [r["advantage"] for r in one] == [r["advantage"] for r in two]
        a, b = (tiny_runs.weights(p / "final") for p in (sparse, run))
        assert all(torch.equal(a[key], b[key]) for key in a)
    dense = finished(world, tmp_path / "dense", credit="attention", **common)
    c = tiny_runs.weights(dense / "final")
    assert not all(torch.equal(a[key], c[key]) for key in a), "the credit changed nothing at all"


def test_the_adaptive_coefficient_follows_its_formula(world: Path, tmp_path: Path) -> None:
    """κ ← κ·(1 + clip(kl/target − 1, ±0.2)·n/horizon), over a run whose KL lies on both sides of the target."""
    spec = "[attention, {kl_penalty: {coef: 0.3, target: 0.4, horizon: 60}}]"
    run = finished(world, tmp_path / "run", credit=spec, steps=6, **{"optim.lr": 0.003, "sampling.batch_size": 12})
    kappa, rows = 0.3, tiny_runs.read_lines(run / "metrics.jsonl")
    errors = []
    for row in rows:
        errors.append(row["objective/kl"] / 0.4 - 1.0)
        kappa *= 1.0 + min(max(errors[-1], -0.2), 0.2) * 12 / 60
        assert row["kl/coef"] == pytest.approx(kappa, rel=1e-5)
    assert min(errors) < 0 < max(errors)
    before = [0.3] + [row["kl/coef"] for row in rows]
    for record in tiny_runs.read_lines(run / "rollouts.jsonl"):
        paid = [c - before[record["step"] - 1] * kl for c, kl in zip(record["credit"], record["kl"], strict=True)]
        assert record["reward"] == pytest.approx(paid, abs=1e-5), "the penalty of a batch is paid with the κ before it"


def test_logged_kl_and_objective_are_recomputed_from_policy_and_start(world: Path, tmp_path: Path) -> None:
    """Step 1 samples from the start, so its KL is 0; the logged log-probabilities are the start's own."""
    run = finished(world, tmp_path / "run", log_rollouts=6)
    start = AutoModelForCausalLM.from_pretrained(world / "policy").eval()
    rows = {row["step"]: row for row in tiny_runs.read_lines(run / "metrics.jsonl")}
    kls: dict[int, list[float]] = {1: [], 2: []}
    for record in tiny_runs.read_lines(run / "rollouts.jsonl"):
        ids, first = record["prompt_ids"] + record["response_ids"], len(record["prompt_ids"])
        with torch.no_grad():
            logits = start(torch.tensor([ids])).logits[0, first - 1 : -1]
        logits[:, [tiny_runs.PAD, tiny_runs.EOS]] = -torch.inf
        logp = logits.log_softmax(dim=-1)[torch.arange(len(ids) - first), record["response_ids"]]
        kl = (torch.tensor(record["logprob"]) - logp).tolist()
        assert record["kl"] == pytest.approx(kl, abs=2e-5)
        kls[record["step"]].append(sum(record["kl"]))
    assert rows[1]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    for step, values in kls.items():
        assert rows[step]["objective/kl"] == pytest.approx(sum(values) / 6, abs=1e-5)
    assert abs(rows[2]["objective/kl"]) > 1e-3


def test_a_start_that_is_an_adapter_runs(world: Path, tmp_path: Path) -> None:
    tiny_runs.policy(world).model.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    records = check_folder(finished(world, tmp_path / "run", policy=tmp_path / "adapter"))
    assert max(abs(kl) for record in records[:4] for kl in record["kl"]) < 1e-5, "the reference is the merged adapter"
    settings = tmp_path / "adapter" / "adapter_config.json"
    for base, message in (("/nowhere/base", "/nowhere/base"), (None, "names no base model")):
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": base}))
        with pytest.raises(ModelError, match=f"policy: got .*adapter.*{message}"):
            train(tiny_runs.config(world, tmp_path / "other", policy=tmp_path / "adapter"))


def test_every_pass_over_the_prompts_has_each_once_in_a_new_order(world: Path) -> None:
    def dealt(seed: int) -> list[list[list[int]]]:
        config = tiny_runs.config(world, seed=seed, **{"sampling.prompt_tokens": "null"})
        stream = make_learner(config, build_method(config)).prompts
        assert len(stream.rows) == 24
        return [
            [stream.rows[place] for step in steps for place in stream.places(step, 6)]
            for steps in (range(1, 5), range(5, 9))
        ]

    (first, second), (again, _), (other, _) = dealt(3), dealt(3), dealt(4)
    assert sorted(first) == sorted(second) and first != second
    assert first == again and first != other


def test_samples_of_one_prompt_stand_together(world: Path, tmp_path: Path) -> None:
    run = finished(world, tmp_path / "run", **{"sampling.samples_per_prompt": 3, "log_rollouts": 6})
    first = [r["prompt_ids"] for r in tiny_runs.read_lines(run / "rollouts.jsonl") if r["step"] == 1]
    assert first[0] == first[1] == first[2] != first[3] == first[4] == first[5]


@pytest.mark.parametrize(("rank", "value_model"), [(4, "separate"), (0, "shared")])
def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    world: Path, tmp_path: Path, rank: int, value_model: str
) -> None:
    """Bit for bit: final weights, metrics but for times and memory, and every number of the logged rollouts."""
    changes = {"lora.rank": rank, "ppo.value_model": value_model, "policy": world / "ending", "steps": 3, **ENDING}
    seeds = {"one": 3, "two": 3, "other": 4}
    runs = {
        name: train(tiny_runs.config(world, tmp_path / name, seed=seed, **changes)).path for name, seed in seeds.items()
    }

    def same(a: str, b: str) -> list[bool]:
        weights = [tiny_runs.weights(runs[name] / "final") for name in (a, b)]
        metrics = [[untimed(row) for row in tiny_runs.read_lines(runs[name] / "metrics.jsonl")] for name in (a, b)]
        rollouts = [(runs[name] / "rollouts.jsonl").read_bytes() for name in (a, b)]
        assert weights[0].keys() == weights[1].keys() and len(metrics[0]) == 3 and len(metrics[0][0]) > 15
        equal = all(
            torch.equal(weights[0][key].view(torch.int32), weights[1][key].view(torch.int32)) for key in weights[0]
        )
        return [equal, metrics[0] == metrics[1], rollouts[0] == rollouts[1]]

    assert same("one", "two") == [True, True, True]
    assert same("one", "other") == [False, False, False]


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    """Return one step's metrics without what the clock and the allocator say."""
    return {name: value for name, value in row.items() if not name.startswith(("time/", "memory/"))}


def test_the_same_seed_gives_the_same_run_in_separate_processes(world: Path, tmp_path: Path) -> None:
    """With two threads, other addresses in memory and other hash seeds; stdout holds the run folder and no more."""
    results = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": {"one": "1", "two": "2"}[name]}
        words = tiny_runs.flags(world, "out/run", **{"lora.rank": 0, "threads": 2})
        command = [sys.executable, "-m", "apportion", "rl", *words]
        done = subprocess.run(
            command, cwd=tmp_path / name, env=environment, capture_output=True, text=True, timeout=240
        )
        assert (done.returncode, done.stdout) == (0, "out/run\n"), done.stderr
        assert "Traceback" not in done.stderr and "Warning" not in done.stderr
        run = tmp_path / name / "out" / "run"
        assert json.loads((run / "status.json").read_text())["threads"] == 2
        metrics = [untimed(row) for row in tiny_runs.read_lines(run / "metrics.jsonl")]
        results.append(((run / "final" / "model.safetensors").read_bytes(), metrics))
    assert results[0] == results[1]


def test_what_nothing_was_set_for_trains_adapters_on_every_layer_by_prefix_differences(
    world: Path, tmp_path: Path
) -> None:
    words = tiny_runs.flags(world, tmp_path / "run")
    unset = ("--algorithm", "--lora.targets", "--optim.lr", "--optim.eps")
    kept = [pair for pair in zip(words[::2], words[1::2], strict=True) if pair[0] not in unset]
    assert main(["rl", *(word for pair in kept for word in pair)]) == 0
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (stored["algorithm"], stored["optim"]["lr"], stored["optim"]["eps"]) == ("red", 1e-3, 1e-8)
    assert stored["credit"][0] == {"prefix_difference": {}} and "kl_penalty" in stored["credit"][1]
    start, final = tiny_runs.weights(world / "policy"), tiny_runs.weights(tmp_path / "run" / "final")
    moved = {name for name in start if not torch.equal(start[name], final[name])}
    assert moved == {name for name in start if "self_attn" in name or "mlp" in name}
    record = tiny_runs.read_lines(tmp_path / "run" / "rollouts.jsonl")[0]
    assert record["credit"][:-1] != [0.0] * (len(record["credit"]) - 1)  # every token earns something


def test_a_reward_model_that_reads_each_prefix_apart_is_warned_of(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=400, num_labels=1, pad_token_id=tiny_runs.PAD, **settings)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "encoder")
    tiny.tokenizer().save_pretrained(tmp_path / "encoder")
    changes = {"reward_model": tmp_path / "encoder", "steps": 1, "compare": "[]"}
    finished(world, tmp_path / "run", **changes, algorithm="red")
    assert "each start of a response is a forward of its own, up to 5 a rollout" in capfd.readouterr().err
    finished(world, tmp_path / "other", **changes, algorithm="ppo")
    assert "a forward of its own" not in capfd.readouterr().err
