"""Evidence from a further model and from a user's function: loaded once, checked, and named when it is wrong."""

from __future__ import annotations

import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_runs
import torch

from apportion import Rollouts, credit, segments
from apportion.config import ScoreConfig
from apportion.errors import ConfigError, DataError, ModelError, ScoreError
from apportion.evidence import Models, plan
from apportion.evidence.process import check_columns, to_tokens, user_functions, wanted_columns
from apportion.evidence.scoring import score
from apportion.registry import EvidenceKey
from apportion.user_code import validate_evidence

MASK = torch.tensor([[True, True, True, False], [True, False, True, True], [False] * 4])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_runs.world(tmp_path_factory.mktemp("world"))
    tiny.save_policy(folder / "dpo", seed=9)
    other = tiny.save_policy(folder / "foreign", seed=9)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(other)
    return folder


class TestImplicit:
    @pytest.mark.parametrize("changes", [{}, {"lora.rank": 0}, {"sampling.temperature": 0.7}])
    def test_equals_a_plain_forward_and_loads_once(self, world: Path, changes: dict) -> None:
        models = tiny_runs.models(world, **changes)
        batch = tiny_runs.sampled(models.policy, tiny_runs.prompts(5))
        method = credit.implicit(model=str(world / "dpo"), clip=None, coef=1.0)
        scored = score(models, batch, method.needs, ScoreConfig(micro_batch=2))
        (held,) = models.others.values()
        assert not any(p.requires_grad for p in held.model.parameters())
        weights = tiny_runs.weights(world / "dpo")
        assert all(torch.equal(v, weights[k]) for k, v in held.model.state_dict().items() if k in weights)
        (name,) = (n for n in method.needs if n.startswith("implicit"))
        for row in range(len(batch)):
            prompt, response = tiny_runs.alone(batch, row)
            with torch.no_grad():
                logits = held.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logits = logits / models.policy.temperature
            logits[:, models.policy.banned] = -torch.inf
            expected = logits.log_softmax(dim=-1)[range(len(response)), response]
            torch.testing.assert_close(scored.evidence[name][row, : len(response)], expected, rtol=0, atol=1e-5)
        rewards, _ = credit.apply(method, scored)
        ratio = torch.where(batch.mask, scored.evidence[name] - scored.evidence["reference_logprobs"], 0.0)
        torch.testing.assert_close(rewards.sum(dim=1), scored.scores + ratio.sum(dim=1), rtol=0, atol=1e-4)
        score(models, batch, method.needs, ScoreConfig())
        assert next(iter(models.others.values())) is held, "loaded a second time"

    def test_without_a_model_the_setting_is_named(self) -> None:
        with pytest.raises(ConfigError, match=r"'implicit_logprobs': got 'no model'.* Set implicit.model"):
            plan(credit.implicit().needs)
        (made,) = (p for p, names in plan(credit.implicit(model="x").needs) if "implicit_logprobs" in p.provides)
        assert (made.forwards, made.backwards) == (1, 0)

    def test_a_model_that_cannot_be_read_is_named(self, world: Path) -> None:
        models = tiny_runs.models(world)
        batch = tiny_runs.sampled(models.policy, tiny_runs.prompts(2))
        for path, why in ((world / "foreign", "a different vocabulary"), (world / "nothing", "no such folder")):
            method = credit.implicit(model=str(path))
            with pytest.raises(ModelError, match=rf"implicit.model: got.*{why}"):
                score(models, batch, method.needs, ScoreConfig())


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a module with functions of a user's."""
    (tmp_path / "own_rewards.py").write_text(
        "def lengths(texts, rollouts, prompts):\n"
        "    assert len(texts) == len(prompts) == len(rollouts)\n"
        "    return [[float(len(texts[i]) + 100 * len(prompts[i]))] * int(n) for i, n in "
        "enumerate(rollouts.mask.sum(dim=1))]\n\n\n"
        "def steps(texts, rollouts, prompts):\n"
        "    return [[1.0, -2.0] for _ in texts]\n\n\n"
        "def broken(texts, rollouts, prompts):\n"
        "    return [[float('nan') if text == texts[-1] else 0.0] * int(n) for text, n in "
        "zip(texts, rollouts.mask.sum(dim=1))]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    return "own_rewards"


class TestProcess:
    def test_numbers_a_token(self, world: Path, mine: str) -> None:
        models = tiny_runs.models(world)
        batch = tiny_runs.sampled(models.policy, tiny_runs.prompts(5))
        method = credit.process(function=f"{mine}:lengths")
        scored = score(models, batch, method.needs, ScoreConfig(micro_batch=2))
        rewards, _ = credit.apply(method, scored)
        decode = models.policy.tokenizer.decode
        for row in range(len(batch)):
            prompt, response = tiny_runs.alone(batch, row)
            each = float(len(decode(response)) + 100 * len(decode(prompt)))
            assert rewards[row].tolist() == [each if m else 0.0 for m in batch.mask[row].tolist()]

    def test_numbers_a_step_of_the_runs_segments(self, world: Path, mine: str) -> None:
        models = tiny_runs.models(world)
        batch = tiny_runs.rollouts_of([[5], [6, 7]], [[50, 51, 52], [60, 61, 62, 63]])
        method = credit.process(function=f"{mine}:steps", unit="step", keep=True)

        def pairs(rollouts: Rollouts) -> torch.Tensor:
            order = rollouts.mask.cumsum(dim=1) - 1
            return torch.where(rollouts.mask, order // 2, -1)

        pairs.needs = frozenset()
        known = Models(models.policy, models.reward, pairs)
        scored = score(known, batch, method.needs, ScoreConfig())
        rewards, _ = credit.apply(method, scored)
        a, b = scored.scores.tolist()
        expected = torch.tensor([[0, 1, a - 2, 0], [0, 1, 0, b - 2]])
        torch.testing.assert_close(rewards, expected)
        with pytest.raises(ConfigError, match="process.unit: got 'step'; expected a run with segments"):
            score(models, batch, method.needs, ScoreConfig())
        with pytest.raises(
            ScoreError, match=r"from own_rewards:steps of rollout 0: got '2 numbers'; expected 3 numbers"
        ):
            score(Models(models.policy, models.reward, segments.tokens()), batch, method.needs, ScoreConfig())

    def test_a_number_that_is_none_is_named_by_the_batchs_rollout(self, world: Path, mine: str) -> None:
        models = tiny_runs.models(world)
        batch = tiny_runs.sampled(models.policy, tiny_runs.prompts(3))
        with pytest.raises(ScoreError, match="from own_rewards:broken, number 0 of rollout 2: got nan"):
            score(models, batch.select(torch.tensor([0, 1, 2])), {key(f"{mine}:broken")}, ScoreConfig(micro_batch=3))
        longest = int(batch.prompt_mask.sum(dim=1).argmax())  # the longest comes first
        assert longest > 0
        with pytest.raises(ScoreError, match=f"from own_rewards:broken.* of rollout {longest}:"):
            score(models, batch, {key(f"{mine}:broken")}, ScoreConfig(micro_batch=1))

    def test_without_a_function_the_setting_is_named(self) -> None:
        with pytest.raises(ConfigError, match=r"'process_rewards': got 'no function'.* Set process.function"):
            plan(credit.process().needs)

    def test_rows_land_on_the_mask(self) -> None:
        found = to_tokens([[1, 2, 3.5], [torch.tensor(4.0), 5, 6], []], MASK, None, "f")
        assert found.tolist() == [[1, 2, 3.5, 0], [4, 0, 5, 6], [0] * 4] and found.dtype == torch.float32
        steps = torch.tensor([[0, 1, 1, -1], [0, -1, 0, 0], [-1] * 4])
        found = to_tokens([[1, 2], [3], []], MASK, steps, "f")
        assert found.tolist() == [[1, 0, 2, 0], [0, 0, 0, 3], [0] * 4]
        found = to_tokens([[(1, 0.5)], [(0, 1), [2, -1]], []], MASK, None, "f")
        assert found.tolist() == [[0, 0.5, 0, 0], [1, 0, 0, -1], [0] * 4]

    @pytest.mark.parametrize(
        "rows",
        [
            [[1, 0, 1], [0, 1, 1], []],
            ((1, 0, 1), [0.0, 1.0, 1.0], ()),
            [[True, False, True], [np.bool_(False), np.bool_(True), True], []],
            [np.array([1, 0, 1]), np.array([0, 1, 1], dtype=np.float16), np.array([])],
            [torch.tensor([1, 0, 1]), torch.tensor([0, 1, 1], dtype=torch.bfloat16), torch.tensor([])],
            [[np.float32(1), torch.tensor(0.0), np.int64(1)], [Fraction(0), 1, torch.tensor([1])[0]], []],
            np.array([[1, 0, 1, np.nan], [0, np.nan, 1, 1], [np.nan] * 4]),
            torch.tensor([[1, 0, 1, 7], [0, 7, 1, 1], [7] * 4], dtype=torch.bfloat16),
            torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1], [0] * 4]).bool(),
            [np.array([[0, 1], [2, 1]]), torch.tensor([[1.0, 1.0], [2.0, 1.0]]), []],
        ],
    )
    def test_rows_are_judged_by_content(self, rows: object) -> None:
        expected = [[1, 0, 1, 0], [0, 0, 1, 1], [0] * 4]
        assert to_tokens(rows, MASK, None, "f").tolist() == expected

    @pytest.mark.parametrize(
        "rows",
        [[0.5, -1, 3], (0.5, np.float32(-1), True), np.array([0.5, -1, 3]), torch.tensor([0.5, -1, 3]).bfloat16(),
         [torch.tensor(0.5), np.int8(-1), 0], [Decimal("0.5"), Fraction(-1), 0]],
    )  # fmt: skip
    @pytest.mark.parametrize("steps", [None, torch.tensor([[0, 1, 1, -1], [0, -1, 0, 0], [-1] * 4])])
    def test_one_number_a_response_is_on_its_last_token(self, rows: object, steps: torch.Tensor | None) -> None:
        assert to_tokens(rows, MASK, steps, "f").tolist() == [[0, 0, 0.5, 0], [0, 0, 0, -1], [0] * 4]

    @pytest.mark.parametrize("rows", [torch.tensor([[0.5], [-1], [3]]), np.array([[0.5], [-1], [3]])])
    def test_an_output_layers_column_is_one_number_a_response(self, rows: object) -> None:
        assert to_tokens(rows, MASK, None, "f").tolist() == [[0, 0, 0.5, 0], [0, 0, 0, -1], [0] * 4]

    @pytest.mark.parametrize(
        ("made", "error", "text"),
        [
            (None, DataError, "the result of f: got 'NoneType'; expected a list of 3 rows"),
            ([[1, 2, 3], [1, 2, 3]], DataError, "the result of f: got '2 rows'"),
            (
                [[1, 2], [1, 2, 3], []],
                ScoreError,
                "from f of rollout 0: got '2 numbers'; expected 3 numbers, one a token",
            ),
            ([[1, 2, 3], 7.0, []], ScoreError, "from f of rollout 1: got 7.0; expected a list"),
            ([[1, 2, 3], [1, 2, float("inf")], []], ScoreError, "from f, number 2 of rollout 1: got inf"),
            ([[1, 2, 3], [1, "2", 3], []], ScoreError, "from f, number 1 of rollout 1: got '2'"),
            ([[1, 2, 3], [1, None, 3], []], ScoreError, "from f, number 1 of rollout 1: got None"),
            ([[1, 2, 3], [1, 2, 3], [1]], ScoreError, "from f of rollout 2: got '1 numbers'; expected 0 numbers"),
            ([[(0, 1), (0, 2)], [1, 2, 3], []], ScoreError, r"from f, pair 1 of rollout 0: got \(0, 2\)"),
            ([[(3, 1)], [1, 2, 3], []], ScoreError, r"from f, pair 0 of rollout 0: got \(3, 1\)"),
            ([[(1, 2, 3)], [1, 2, 3], []], ScoreError, r"from f, pair 0 of rollout 0: got \(1, 2, 3\)"),
            ([[(1, float("nan"))], [1, 2, 3], []], ScoreError, "from f, number 0 of rollout 0: got nan"),
            ([[1, (1, 2), 3], [1, 2, 3], []], ScoreError, r"from f, number 1 of rollout 0: got \(1, 2\)"),
            (0.5, DataError, "the result of f: got 'float'; expected a list of 3 rows"),
            (torch.tensor(0.5), DataError, "the result of f: got 'float'"),
            ({0: [1]}, DataError, "the result of f: got 'dict'"),
            ((row for row in ()), DataError, "the result of f: got 'generator'"),
            (torch.ones(2, 4), DataError, "the result of f: got '2 rows'"),
            (torch.ones(3, 5), ScoreError, "from f of rollout 0: got '5 numbers'; expected 3 numbers"),
            ([None, [1, 2, 3], []], ScoreError, "from f of rollout 0: got None; expected a list of numbers"),
            ([None] * 3, ScoreError, "from f of rollout 0: got None"),
            ([1.0, 10**400, 0.0], ScoreError, "from f of rollout 1: got an integer of 1329 bits; expected a finite"),
            ([1.0, Decimal("NaN"), 0.0], ScoreError, "from f of rollout 1: got Decimal"),
            ([1.0, None, 0.0], ScoreError, "from f of rollout 1: got None; expected a finite number"),
            ([1.0, 2.0, float("nan")], ScoreError, "from f of rollout 2: got nan"),
            (np.array([1.0, np.inf, 0.0]), ScoreError, "from f of rollout 1: got inf"),
            (np.full((3, 4), np.nan), ScoreError, "from f, number 0 of rollout 0: got nan"),
            (["1", "2", "3"], ScoreError, "from f of rollout 0: got '1'"),
            ([[(1.5, 1)], [1, 2, 3], []], ScoreError, r"from f, pair 0 of rollout 0: got \(1.5, 1\)"),
        ],
    )
    def test_what_is_wrong_is_named(self, made: object, error: type[Exception], text: str) -> None:
        with pytest.raises(error, match=text):
            to_tokens(made, MASK, None, "f")


COLUMNS = """
import torch


def answers(texts, rollouts, prompts, answer=None, **columns):
    assert "prompts" not in columns and all(len(values) == len(texts) for values in columns.values())
    return [float(value) for value in answer]


def one(texts, rollouts, prompts, *, missing=None, answer):
    assert missing is None
    return [float(value) for value in answer]


def required(texts, rollouts, prompts, solution):
    return [0.0 for _ in texts]


def evidence(models, rollouts, texts, answer):
    return [float(value) for value in answer]
"""


class TestColumns:
    @pytest.fixture
    def own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        (tmp_path / "own_columns.py").write_text(COLUMNS)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "own_columns", raising=False)
        return "own_columns"

    def scored(self, world: Path, needs: set[str], columns: list[dict[str, object]]) -> Rollouts:
        """Return five rollouts of three rows, two of them with the same ids, scored two at a time."""
        models = tiny_runs.models(world)
        models.columns = columns
        batch = tiny_runs.sampled(models.policy, [[5, 6], [5, 6], [7], [5, 6], [8, 9, 10]])
        batch = batch.with_evidence(source_row=torch.tensor([0, 1, 2, 1, 2]))
        return score(models, batch, needs, ScoreConfig(micro_batch=2))

    @pytest.mark.parametrize("name", ["answers", "one"])
    def test_each_rollout_gets_those_of_its_own_row(self, world: Path, own: str, name: str) -> None:
        need = key(f"{own}:{name}")
        rows = [{"answer": "3", "prompts": "p"}, {"answer": "4", "prompts": "p"}, {"answer": "5", "prompts": "p"}]
        found = self.scored(world, {need}, rows).evidence[need]
        assert found.sum(dim=1).tolist() == [3, 4, 5, 4, 5]

    def test_evidence_gets_them_too(self, world: Path, own: str) -> None:
        need = f"{own}:evidence"
        found = self.scored(world, {need}, [{"answer": i} for i in (3, 4, 5)]).evidence[need]
        assert found.tolist() == [3, 4, 5, 4, 5]

    def test_a_column_that_is_not_there_is_named(self, world: Path, own: str) -> None:
        functions = user_functions({key(f"{own}:required"), "scores", f"{own}:evidence"})
        assert set(functions) == {f"{own}:required", f"{own}:evidence"}
        assert wanted_columns(functions) == {"solution", "answer"}
        assert wanted_columns(user_functions({key(f"{own}:answers")})) is None
        check_columns(functions, [{"answer": 1}, {"solution": 2}])
        missing = "prompts: got \"no column 'solution'\"; expected the columns that own_columns:required takes"
        with pytest.raises(DataError, match=missing):
            check_columns(functions, [{"answer": 1}])
        with pytest.raises(DataError, match=missing):
            self.scored(world, {key(f"{own}:required")}, [{"answer": 1}] * 3)
        with pytest.raises(DataError, match=missing):  # rollouts of another source
            self.scored(world, {key(f"{own}:required")}, [])

    def test_user_supplied_evidence_is_judged_by_content(self) -> None:
        for given in ([1, 0, 2.0], np.array([1, 0, 2]), torch.tensor([1.0, 0, 2]), (np.float32(1), False, 2)):
            assert validate_evidence("f", given, MASK).tolist() == [1, 0, 2]
        assert validate_evidence("f", [np.zeros(4)] * 3, MASK).shape == (3, 4)
        for given in ([1, None, 2], [[1], [1, 2], []], 3.0, ["a", "b", "c"], [1, 2], {"a": 1}, None):
            with pytest.raises(DataError, match="a tensor"):
                validate_evidence("f", given, MASK)
        with pytest.raises(ScoreError, match="of rollout 1: got nan"):
            validate_evidence("f", [1, float("nan"), 2], MASK)


def key(function: str) -> str:
    return EvidenceKey("process_rewards", function=function, unit="token")
