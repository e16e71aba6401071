"""The PPO-ptx mix: its gradient against one written out by hand, its order, its rows, and runs that resume with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

from apportion.cli.main import main
from apportion.config import OptimConfig, PPOConfig
from apportion.errors import ConfigError, DataError
from apportion.evidence.scoring import score
from apportion.losses import ppo
from apportion.models.policy import Policy
from apportion.models.text.targets import TRUNCATE, Limits
from apportion.stages.rl import train as rl
from apportion.stages.rl.mix import Encoded, Mix, open_mix
from apportion.stages.rl.update import Targets, update
from apportion.types import Rollouts

TEXTS = [
    {"prompt": "This film was", "completion": " a great story, well told."},
    {"prompt": "Boring", "completion": " from beginning to end."},
    {"prompt": "A lovely little picture", "completion": "!"},
]
GAMMA = 0.7


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_runs.world(tmp_path_factory.mktemp("world"))
    (folder / "mix.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    return folder


def by_hand(policy: Policy, rows: list[Encoded]) -> torch.Tensor:
    """Return the mean negative log-likelihood a trained token, one text at a time by the model's own forward."""
    total, count = torch.zeros(()), 0
    for row in rows:
        logits = policy.model(input_ids=torch.tensor([row.prompt + row.completion])).logits[0].float()
        logprobs = logits.log_softmax(dim=-1)
        for place, (token, trained) in enumerate(zip(row.completion, row.trained, strict=True), len(row.prompt)):
            total, count = total - trained * logprobs[place - 1, token], count + trained
    return total / count


def grads(policy: Policy) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.trainable()]


def zero(policy: Policy) -> None:
    for parameter in policy.trainable():
        parameter.grad = None


def rows_of(policy: Policy) -> list[Encoded]:
    ends = [1]
    encoded = []
    for row in TEXTS:
        prompt, completion = (policy.tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        encoded.append(Encoded(prompt, completion + ends, [True] * (len(completion) + 1)))
    encoded[0].trained[1] = False  # as between two answers of a conversation
    return encoded


@pytest.mark.parametrize("changes", [{}, {"lora.rank": 0}, {"sampling.stop": "eos", "sampling.temperature": 0.5}])
@pytest.mark.parametrize("micro", [16, 2, 1])
def test_the_gradient_is_that_of_the_likelihood_by_hand(world: Path, changes: dict[str, Any], micro: int) -> None:
    policy = tiny_runs.policy(world, **changes)
    mix = Mix(rows_of(policy), GAMMA, 3, seed=0)
    mix.begin(1, 1)
    nll = mix.backward(policy, micro, 2048)["loss/ptx"]
    found = grads(policy)
    zero(policy)
    expected = by_hand(policy, mix.rows)
    (GAMMA * expected).backward()
    assert float(nll) == pytest.approx(float(expected), abs=2e-6)
    assert any(one.abs().max() > 1e-3 for one in found)
    for one, other in zip(found, grads(policy), strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-4)


def test_the_end_token_is_learned_where_sampling_never_ends(world: Path) -> None:
    policy = tiny_runs.policy(world)  # sampling.stop: length
    assert 1 in policy.banned
    mix = Mix([Encoded([5], [1], [True])], 1.0, 1, seed=0)
    assert torch.isfinite(mix.backward(policy, 1, 64)["loss/ptx"])
    assert 1 in policy.banned and policy.temperature == 1.0


def test_an_update_is_ppo_plus_the_mix(world: Path) -> None:
    policy = tiny_runs.policy(world)

    def gradient(mix: Mix | None) -> list[torch.Tensor]:
        models = tiny_runs.Models(policy, tiny_runs.judge(world))
        batch = score(
            models, tiny_runs.sampled(policy, tiny_runs.prompts(4)), {"values", "reference_logprobs"}, models.scores
        )
        optimizer, seen = torch.optim.SGD(policy.trainable(), lr=0.0), []
        optimizer.register_step_pre_hook(lambda *_: seen.extend(grads(policy)))
        settings = PPOConfig(epochs=1, mini_batch=8, value_tokens="first", whiten_advantages=False)
        generator = torch.Generator().manual_seed(0)
        update(
            policy,
            optimizer,
            ppo(),
            batch,
            targets_of(batch),
            settings,
            OptimConfig(max_grad_norm=1e9),
            generator,
            mix=mix,
        )
        return seen

    mix = Mix(rows_of(policy), GAMMA, 3, seed=0)
    plain_gradient, both_gradient = gradient(None), gradient(mix)
    (GAMMA * by_hand(policy, mix.rows)).backward()
    for plain, both, own in zip(plain_gradient, both_gradient, grads(policy), strict=True):
        torch.testing.assert_close(both - plain, own, atol=3e-6, rtol=1e-3)


def targets_of(batch: Rollouts) -> Targets:
    noise = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(1))
    ids = torch.where(batch.mask, batch.mask.cumsum(dim=1) - 1, -1)
    return Targets(noise, noise, batch.mask, batch.mask, ids)


def test_the_order_follows_from_seed_and_step(world: Path) -> None:
    rows = [Encoded([1], [i], [True]) for i in range(7)]

    def taken(mix: Mix, step: int) -> list[int]:
        mix.begin(step, 2)
        return [row.completion[0] for _ in range(2) for row in mix.take()]

    one, other = Mix(rows, 1.0, 3, seed=4), Mix(rows, 1.0, 3, seed=4)
    steps = [taken(one, step) for step in (1, 2, 3, 4)]
    assert [taken(other, step) for step in (4, 2)] == [steps[3], steps[1]]  # no state of earlier steps
    flat = [i for step in steps for i in step]
    assert sorted(flat[:7]) == sorted(flat[7:14]) == list(range(7)) and flat[:7] != flat[7:14]
    assert taken(Mix(rows, 1.0, 3, seed=5), 1) != steps[0]


def flags(world: Path, output: Path, **changes: Any) -> list[str]:
    more = {
        "ppo.ptx_coef": 1.0,
        "ppo.ptx_data": world / "mix.jsonl",
        "ppo.ptx_batch": 2,
        "credit": "sparse",
        "steps": 4,
    }
    return tiny_runs.flags(world, output, **more | changes)


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = tiny_runs.read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]


def test_a_run_lowers_the_mix_and_without_it_nothing_changes(world: Path, tmp_path: Path) -> None:
    assert main(["rl", *flags(world, tmp_path / "with")]) == 0
    found = [row["loss/ptx"] for row in metrics(tmp_path / "with")]
    assert found[-1] < found[0]
    off = {"ppo.ptx_coef": 0.0, "ppo.ptx_data": "null"}
    assert main(["rl", *flags(world, tmp_path / "off", **off)]) == 0
    plain = tiny_runs.flags(world, tmp_path / "plain", credit="sparse", steps=4)
    assert main(["rl", *plain]) == 0
    assert metrics(tmp_path / "off") == metrics(tmp_path / "plain") and "loss/ptx" not in metrics(tmp_path / "off")[0]
    one, other = (tiny_runs.weights(tmp_path / name / "final") for name in ("off", "plain"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_run_with_a_mix_and_a_best_policy_resumes_bit_for_bit(world: Path, tmp_path: Path) -> None:
    held = {
        "keep_best.every": 1,
        "keep_best.prompts": world / "prompts.jsonl",
        "keep_best.count": 6,
        "checkpoint_every": 1,
    }
    config = {name: tiny_runs.config(world, tmp_path / name, **changes_of(world) | held) for name in ("whole", "cut")}
    rl.train(config["whole"])

    def stop(step: int, steps: int, values: dict[str, float]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rl.train(config["cut"], on_step=stop)
    rl.train(config["cut"])
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    one, other = (tiny_runs.weights(tmp_path / name / "final") for name in ("cut", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    best = [json.loads((tmp_path / name / "best" / "best.json").read_text()) for name in ("cut", "whole")]
    assert best[0] == best[1]
    rows = metrics(tmp_path / "whole")
    highest = max(rows, key=lambda row: row["held_out/reward"])
    assert best[0]["step"] == highest["step"] == rows[-1]["held_out/best_step"]
    assert best[0]["reward"]["mean"] == pytest.approx(highest["held_out/reward"]) and best[0]["prompts"] == 6
    kept = tiny_runs.weights(tmp_path / "whole" / "best")
    assert kept.keys() == other.keys()
    if highest["step"] == 4:
        assert all(torch.equal(kept[name], other[name]) for name in kept)


def changes_of(world: Path) -> dict[str, Any]:
    return {
        "ppo.ptx_coef": 1.0,
        "ppo.ptx_data": world / "mix.jsonl",
        "ppo.ptx_batch": 2,
        "credit": "sparse",
        "steps": 4,
    }


@pytest.mark.parametrize("rank", [4, 0])
def test_the_best_policy_is_that_of_its_step(world: Path, tmp_path: Path, rank: int) -> None:
    """A run that ends at the step of the best policy has the same weights: saving it changes nothing in training."""
    held = {"keep_best.every": 1, "keep_best.prompts": world / "prompts.jsonl", "keep_best.count": 6, "lora.rank": rank}
    held |= {"credit": "sparse", "dtype": "bfloat16", "optim.lr": 0.002}
    assert main(["rl", *tiny_runs.flags(world, tmp_path / "run", **held)]) == 0
    plain = {"credit": "sparse", "lora.rank": rank, "dtype": "bfloat16", "optim.lr": 0.002}
    assert main(["rl", *tiny_runs.flags(world, tmp_path / "plain", **plain)]) == 0
    one, other = (tiny_runs.weights(tmp_path / name / "final") for name in ("run", "plain"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    best = tiny_runs.weights(tmp_path / "run" / "best")
    assert all(value.dtype == torch.float32 for value in best.values())
    step = json.loads((tmp_path / "run" / "best" / "best.json").read_text())["step"]
    same = all(torch.equal(best[name], other[name]) for name in other)
    assert same == (step == 2)


# rows of the mix


def test_rows_of_every_form(world: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Good?"}, {"role": "assistant", "content": "Yes."}]
    forms = {
        "text": [{"text": "A great film."}],
        "pair": [{"prompt": "A great", "completion": " film."}],
        "turns": [{"messages": turns}],
        "split": [{"prompt": turns[:1], "completion": turns[1:]}],
    }
    policy = tiny_runs.policy(world)
    tokenizer = policy.tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    forms["answers"] = [{"messages": [*turns, {"role": "user", "content": "Bad?"}, turns[1]]}]
    found = {}
    for name, rows in forms.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = changes_of(world) | {"ppo.ptx_data": tmp_path / f"{name}.jsonl"}
        config = tiny_runs.config(world, tmp_path / "run", **changes)
        mix = open_mix(config, tokenizer, [tokenizer.eos_token_id], Limits(256, TRUNCATE))
        assert mix is not None
        (row,) = mix.rows
        found[name] = tuple(tokenizer.decode(ids) for ids in row[:2])
        if name != "answers":
            assert all(row.trained[: len(row.completion) - found[name][1].endswith("\n")])
    assert found["pair"] == ("A great", " film.<eos>")
    assert "".join(found["text"]) == "A great film.<eos>"
    assert found["turns"] == found["split"] == ("<user>Good?<eos>\n<assistant>", "Yes.<eos>\n")
    # every answer of a conversation is learned, what the user says is not
    parts = [tokenizer.decode(i) for i, trained in zip(row.completion, row.trained, strict=True) if trained]
    assert "".join(parts) == "Yes.<eos>\nYes.<eos>\n" and "Bad?" in found["answers"][1]
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "A great", "completion": " film" * 50}))
    config = tiny_runs.config(world, tmp_path / "run", **(changes | {"ppo.ptx_data": tmp_path / "long.jsonl"}))
    cut = open_mix(config, tokenizer, [tokenizer.eos_token_id], Limits(10, TRUNCATE))
    assert cut is not None and len(cut.rows[0].prompt + cut.rows[0].completion) == 10


@pytest.mark.parametrize(
    ("rows", "changes", "pieces"),
    [
        ([{"prompt": "A"}], {}, ["ppo.ptx_data: got", "completion"]),
        ([{"text": ""}], {}, ["ppo.ptx_data: got", "line 1: text = ''"]),
        ([{"messages": [{"role": "user", "content": "A"}]}], {}, ["a conversation that ends with an answer"]),
        ([{"prompt": [], "completion": []}], {}, ["ppo.ptx_data"]),
        ([{"other": "A"}], {}, ["ppo.ptx_data: got", "'text'"]),
        (
            [{"prompt": "A long, long prompt", "completion": "B"}],
            {"ppo.ptx_tokens": 3},
            ["ppo.ptx_data: got", "tokens before the answer", "Raise ppo.ptx_tokens"],
        ),
    ],
)
def test_rows_that_cannot_be_learned(
    world: Path, tmp_path: Path, rows: Any, changes: dict[str, Any], pieces: list[str]
) -> None:
    (tmp_path / "mix.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = changes_of(world) | {"ppo.ptx_data": tmp_path / "mix.jsonl"} | changes
    with pytest.raises(DataError) as caught:
        rl.train(tiny_runs.config(world, tmp_path / "run", **more))
    for piece in pieces:
        assert piece in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"ppo.ptx_coef": 1.0}, ["ppo.ptx_data: got None", "texts to learn"]),
        ({"ppo.ptx_data": "mix.jsonl"}, ["ppo.ptx_coef: got 0.0", "above 0"]),
        ({"keep_best.every": 2}, ["keep_best.prompts: got None", "held-out prompts"]),
    ],
)
def test_settings_without_their_data(world: Path, tmp_path: Path, changes: dict[str, Any], pieces: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        rl.train(tiny_runs.config(world, tmp_path / "run", **changes))
    for piece in pieces:
        assert piece in str(caught.value)
