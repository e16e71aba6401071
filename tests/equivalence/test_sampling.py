"""The sampler against exact distributions and full forwards: what is drawn, where rows end, and what was recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_runs
import torch
from scipy.stats import chisquare

from apportion.config import SamplingConfig
from apportion.errors import ModelError
from apportion.generation import sample
from apportion.generation.draw import allowed_, check_logprobs, draw

EOS, PAD = tiny_runs.EOS, tiny_runs.PAD


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


def fits(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Return the p-value of `counts` under probabilities `p`, ids that are expected less than 5 times put together."""
    expected = p.double() / p.double().sum() * counts.sum()
    rare = expected < 5
    pool = torch.cat([expected[~rare], expected[rare].sum()[None]])
    seen = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    keep = pool > 0
    assert seen[~keep].sum() == 0
    return 1.0 if keep.sum() == 1 else float(chisquare(seen[keep].numpy(), pool[keep].numpy()).pvalue)


@torch.no_grad()
def next_token(policy, prompt, temperature, banned):
    """Return softmax(logits / temperature) (V,) after `prompt` without the banned ids, from a plain forward."""
    logits = policy.model(torch.tensor([prompt])).logits[0, -1].double() / temperature
    logits[banned] = -torch.inf
    return logits.softmax(dim=-1)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_tokens_follow_the_softmax_of_logits_over_temperature(world: Path, temperature: float) -> None:
    policy = tiny_runs.policy(world, **{"sampling.temperature": temperature})
    prompt = [17, 230, 99, 5]
    batch = tiny_runs.sampled(policy, [prompt], samples_per_prompt=3000, max_new_tokens=1)
    counts = torch.bincount(batch.response_ids[:, 0], minlength=400)
    assert fits(counts, next_token(policy, prompt, temperature, [PAD, EOS])) > 1e-3
    wrong = next_token(policy, prompt, temperature * 1.7, [PAD, EOS])
    assert fits(counts, wrong) < 1e-6, "this many rows could not tell one temperature from another"


def test_the_second_token_follows_its_own_prompt_and_first_token(world: Path) -> None:
    """Through the cache: rows of two ragged prompts that drew the same first token."""
    policy = tiny_runs.policy(world)
    policy.banned = [i for i in range(400) if i not in (30, 31, 32, 33)]
    prompts = [[17, 230, 99, 5], [44]]
    batch = tiny_runs.sampled(policy, prompts, samples_per_prompt=1200, max_new_tokens=2)
    for number, prompt in enumerate(prompts):
        for first in (30, 31, 32, 33):
            rows = (batch.group == number) & (batch.response_ids[:, 0] == first)
            counts = torch.bincount(batch.response_ids[rows, 1], minlength=400)
            assert fits(counts, next_token(policy, [*prompt, first], 1.0, policy.banned)) > 1e-3


@pytest.mark.parametrize(
    "logits",
    [
        torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]),
        torch.tensor([-torch.inf, -torch.inf, -3e38, -torch.inf, -torch.inf]),
        torch.tensor([-torch.inf, 3e38, -3e38, 0.0, -torch.inf]),
        torch.tensor([1e30, -torch.inf, 1e30, 1e30, -torch.inf]),
        torch.tensor([-torch.inf, -700.0, -700.0, 0.0, -torch.inf]),
    ],
)
def test_an_id_of_probability_zero_is_never_drawn(logits: torch.Tensor) -> None:
    p = logits.softmax(dim=-1)
    ids, logprobs = draw(logits.expand(50_000, -1), uniforms(50_000))
    assert ids.shape == logprobs.shape == (50_000,) and ids.dtype == torch.int64 and logprobs.dtype == torch.float32
    counts = torch.bincount(ids, minlength=5)
    assert len(counts) == 5 and counts[p == 0].sum() == 0
    assert fits(counts, p) > 1e-3
    torch.testing.assert_close(logprobs, logits.log_softmax(dim=-1)[ids], rtol=1e-6, atol=1e-6)


def uniforms(count: int, seed: int = 0) -> torch.Tensor:
    """Return uniforms (count,) as the sampler draws them."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53, 0.5])
@pytest.mark.parametrize("size", [5, 16, 17, 300])
def test_the_ends_of_the_uniform_draw_the_first_and_the_last_id_that_is_allowed(size: int, uniform: float) -> None:
    logits = torch.full((1, size), -torch.inf)
    logits[0, 2], logits[0, 3] = 0.3, 0.3
    ids, _ = draw(logits, torch.tensor([uniform], dtype=torch.float64))
    assert ids.tolist() == [2 if uniform < 0.5 else 3]


@pytest.mark.parametrize("size", [1, 2, 7, 64, 65, 400, 5000])
def test_blocks_invert_the_whole_cumulative_distribution(size: int) -> None:
    """Against searchsorted over all of it in float64; a uniform within rounding of a step may fall on either side."""
    logits = torch.randn(300, size, generator=torch.Generator().manual_seed(size)) * 3
    logits[:, ::3] = -torch.inf if size > 1 else 0.0
    u = uniforms(300, seed=size)
    ids, logprobs = draw(logits, u)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    cumulative = cumulative / cumulative[:, -1:]
    upper = cumulative.gather(1, ids[:, None])[:, 0]
    lower = upper - logits.double().softmax(dim=-1).gather(1, ids[:, None])[:, 0]
    assert (u >= lower - 1e-6).all() and (u <= upper + 1e-6).all()
    exact = torch.searchsorted(cumulative, u[:, None], right=True)[:, 0]
    assert (ids == exact).float().mean() > 0.99
    # in float64: log_softmax in float32 is itself off by 2e-6 where the vocabulary is large
    expected = logits.double().log_softmax(dim=-1).gather(1, ids[:, None])[:, 0].float()
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=2e-6)


def test_drawing_from_a_large_vocabulary_is_exact_in_the_tail() -> None:
    """50,000 ids, half of the mass on ids of 1e-5 each: sums in float32 alone would lose some of it."""
    p = torch.full((50_000,), 0.5 / 49_999)
    p[0] = 0.5
    ids, _ = draw(p.log().expand(4_000, -1), uniforms(4_000, seed=1))
    tail = torch.bincount(ids, minlength=50_000)
    assert fits(torch.stack([tail[0], tail[1:].sum()]), torch.tensor([0.5, 0.5])) > 1e-3
    places = torch.histc(ids[ids > 0].float(), bins=40, min=0, max=50_000).long()
    assert fits(places, torch.full((40,), 1 / 40)) > 1e-3


def test_allowed_in_place_is_the_policys_distribution(world: Path) -> None:
    policy = tiny_runs.policy(world, **{"sampling.temperature": 0.7})
    logits = torch.randn(5, 400, generator=torch.Generator().manual_seed(0))
    for given in (logits, logits.bfloat16()):
        expected = policy.allowed(given)
        got = allowed_(given.clone(), torch.tensor(policy.banned), policy.temperature)
        assert torch.equal(got, expected) and got.dtype == torch.float32


def test_rows_without_a_finite_probability_are_refused_by_number() -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = torch.nan
    _, logprobs = draw(logits, uniforms(3))
    with pytest.raises(ModelError, match="rollout 11: got nan"):
        check_logprobs(logprobs, torch.tensor([10, 11, 12]))
    logits[1] = -torch.inf
    assert not torch.isfinite(draw(logits, uniforms(3))[1][1])


@pytest.mark.parametrize(("stop", "never"), [("length", [PAD, EOS]), ("eos", [PAD])])
def test_banned_ids_are_never_sampled_however_likely(world: Path, stop: str, never: list[int]) -> None:
    policy = tiny_runs.policy(world, **{"sampling.stop": stop})
    for token in never:
        tiny_runs.make_likely(policy.model, token, 30.0)
    free = policy.model(torch.tensor([[9, 8, 7]])).logits[0, -1].softmax(dim=-1)
    assert free[never].sum() > 0.9, "they would not have been sampled anyway"
    batch = tiny_runs.sampled(policy, tiny_runs.prompts(40), stop=stop, max_new_tokens=8)
    assert not torch.isin(batch.response_ids[batch.mask], torch.tensor(never)).any()
    assert torch.isfinite(batch.logprobs).all()
    if stop == "length":
        assert batch.mask.all() and batch.mask.shape == (40, 8) and not batch.ended.any()


def test_rows_end_at_their_first_eos_which_is_on_the_mask(world: Path) -> None:
    policy = tiny_runs.policy(world, stirred=False, policy=world / "ending", **{"sampling.stop": "eos"})
    batch = tiny_runs.sampled(policy, tiny_runs.prompts(60), stop="eos", max_new_tokens=12)
    lengths = batch.mask.sum(dim=1)
    assert (lengths == 1).any() and (lengths == 12).any(), "no short or no long rows"
    for row in range(60):
        ids, mask = batch.response_ids[row], batch.mask[row]
        n = int(lengths[row])
        assert mask[:n].all() and not mask[n:].any()
        assert (ids[n:] == PAD).all() and (batch.logprobs[row, n:] == 0).all() and (batch.logprobs[row, :n] < 0).all()
        assert not (ids[: n - 1] == EOS).any()
        assert bool(batch.ended[row]) == (ids[n - 1].item() == EOS)
        assert n == 12 or batch.ended[row]
    assert (batch.ended & (lengths == 12)).any() or (~batch.ended).any()


def test_the_batch_is_no_wider_than_its_longest_row(world: Path) -> None:
    policy = tiny_runs.policy(world, stirred=False, policy=world / "ending", **{"sampling.stop": "eos"})
    policy.banned = [i for i in range(400) if i != EOS]
    batch = tiny_runs.sampled(policy, tiny_runs.prompts(3), stop="eos", max_new_tokens=12)
    assert batch.response_ids.tolist() == [[EOS]] * 3 and batch.ended.all() and batch.mask.all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("stop", ["length", "eos"])
def test_recorded_logprobs_are_a_full_forwards(world: Path, stop: str, temperature: float) -> None:
    """Left-padded ragged prompts through the cache, against one plain forward of each row without any padding."""
    changes = {"sampling.stop": stop, "sampling.temperature": temperature, "policy": world / "ending"}
    policy = tiny_runs.policy(world, **changes)
    batch = tiny_runs.sampled(policy, tiny_runs.prompts(12), stop=stop, max_new_tokens=8)
    assert not batch.prompt_mask.all()
    for row in range(12):
        prompt, ids = tiny_runs.alone(batch, row)
        with torch.no_grad():
            logits = policy.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature
        logits[:, policy.banned] = -torch.inf
        expected = logits.log_softmax(dim=-1)[torch.arange(len(ids)), ids]
        torch.testing.assert_close(batch.logprobs[row, : len(ids)], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "mistral (window 4)", "opt", "gpt-neox", "qwen3 (q/k norm)"])
def test_recorded_logprobs_are_a_full_forwards_on_other_architectures(world: Path, name: str) -> None:
    policy = tiny_runs.policy(world)
    policy.model = tiny_runs.causal(name)
    policy.value_head = None
    prompts = [[1 + i % 90 for i in row] for row in tiny_runs.prompts(6)]
    batch = tiny_runs.sampled(policy, prompts, max_new_tokens=8)
    torch.testing.assert_close(batch.logprobs, policy.forward(batch).logprobs, rtol=0, atol=2e-5)
    for row in range(6):
        prompt, ids = tiny_runs.alone(batch, row)
        single = policy.forward(tiny_runs.rollouts_of([prompt], [ids])).logprobs[0]
        torch.testing.assert_close(batch.logprobs[row], single, rtol=0, atol=2e-5)


def test_the_same_seed_gives_the_same_rollouts_whatever_else_is_random(world: Path) -> None:
    policy, prompts = tiny_runs.policy(world), tiny_runs.prompts(6)
    one = tiny_runs.sampled(policy, prompts, seed=5)
    torch.manual_seed(999)
    state = torch.get_rng_state()
    two = tiny_runs.sampled(policy, prompts, seed=5)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert torch.equal(one.response_ids, two.response_ids) and torch.equal(one.logprobs, two.logprobs)
    assert not torch.equal(one.response_ids, tiny_runs.sampled(policy, prompts, seed=6).response_ids)


def test_samples_of_a_prompt_share_a_group_and_differ(world: Path) -> None:
    policy, prompts = tiny_runs.policy(world), tiny_runs.prompts(3)
    batch = tiny_runs.sampled(policy, prompts, samples_per_prompt=4)
    assert batch.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [tiny_runs.alone(batch, row)[0] for row in range(12)] == [p for p in prompts for _ in range(4)]
    assert len({tuple(row) for row in batch.response_ids.tolist()}) == 12


def test_another_model_can_write_with_the_policys_rules(world: Path) -> None:
    policy = tiny_runs.policy(world, **{"lora.rank": 0})
    config = SamplingConfig(max_new_tokens=6)
    batch = sample(policy, tiny_runs.prompts(6), config, torch.Generator().manual_seed(0), model=policy.reference)
    torch.testing.assert_close(batch.logprobs, policy.reference_logprobs(batch), rtol=0, atol=1e-5)
    assert (batch.logprobs - policy.forward(batch).logprobs).abs().max() > 0.01
