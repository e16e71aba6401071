"""Our estimator and losses beside those of released TRL on the same inputs; docs/peers.md explains each difference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from torch import Tensor

from apportion import Rollouts, advantages, credit, losses, segments
from apportion.masking import whiten
from apportion.types import PolicyLoss

pytestmark = [pytest.mark.long, pytest.mark.peers]

HERE = Path(__file__).parent
SOURCE = HERE.parent.parent / "src"


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that puts a released TRL, without its dependencies, into a folder of its own."""
    found: dict[str, Path] = {}

    def get(version: str) -> Path:
        if version not in found:
            folder = tmp_path_factory.mktemp(f"trl-{version}")
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            done = subprocess.run(
                [*command, "--target", str(folder), f"trl=={version}"], capture_output=True, text=True
            )
            assert done.returncode == 0, f"pip could not install trl=={version}: {done.stderr}"
            found[version] = folder
        return found[version]

    return get


def call(script: str, trl: Path, *arguments: object) -> None:
    """Run a script of this folder with that TRL first on its path."""
    paths = os.pathsep.join(map(str, (trl, SOURCE, HERE.parent / "support")))
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


# --- PPO of TRL 1.12.0 ------------------------------------------------------------------------------------------------

KAPPA, GAMMA, LAMBDA, CLIP, VALUE_CLIP, VALUE_COEF = 0.2, 0.97, 0.9, 0.15, 0.1, 0.3


@pytest.fixture(scope="session")
def ppo_run(released: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    """Return a function: what TRL's trainer held while it trained on one batch in that many micro-batches."""
    found: dict[int, Any] = {}

    def get(accumulate: int) -> Any:
        if accumulate not in found:
            target = tmp_path_factory.mktemp("ppo") / "record.pt"
            call("trl_ppo.py", released("1.12.0"), target, accumulate)
            found[accumulate] = torch.load(target)
        return found[accumulate]

    return get


def assert_same(got: Tensor, expected: Tensor, within: float = 2e-6) -> None:
    torch.testing.assert_close(got, expected, rtol=within, atol=within)


def rollouts_of(batch: dict[str, Tensor], mask: Tensor) -> Rollouts:
    """Return TRL's batch as rollouts on `mask`."""
    return helpers.rollouts(
        mask,
        ["values", "reference_logprobs"],
        dirty=False,
        response_ids=batch["responses"],
        logprobs=batch["logprobs"],
        scores=batch["scores"],
        values=batch["values"],
        reference_logprobs=batch["ref_logprobs"],
    )


def test_the_batch_can_show_a_difference(ppo_run):
    batch = ppo_run(1)["batch"]
    lengths = (~batch["padding_mask"]).sum(dim=1)
    assert lengths.min() < 9 and lengths.unique().numel() > 2
    assert ppo_run(1)["log"]["policy/clipfrac_avg"] > 0


def test_our_score_is_on_eos_and_trls_on_the_pad_after_it(ppo_run):
    """The KL penalties agree token by token; the score stands one position later in TRL, and both sums are equal."""
    batch = ppo_run(1)["batch"]
    mask = ~batch["padding_mask"]
    method = credit.chain(credit.sparse(), credit.kl_penalty(coef=KAPPA))
    rewards, _ = credit.apply(method, rollouts_of(batch, mask))
    last = mask.sum(dim=1) - 1
    assert torch.equal(batch["sequence_lengths"], last)
    rows, length = mask.any(dim=1).nonzero().squeeze(1), mask.shape[1]  # TRL may sample the pad token first: no token
    last, scores, theirs = last[rows], batch["scores"][rows], batch["rewards"][rows]
    assert len(rows) > 5 and (last < length - 1).any()
    assert_same(rewards[rows].sum(dim=1), theirs.sum(dim=1), 1e-5)
    expected, here = rewards[rows], torch.arange(len(rows))
    expected[here, last] -= scores
    expected[here, torch.where(last + 1 < length, last + 1, last)] += scores
    assert_same(theirs, expected, 1e-5)


def test_gae_and_whitening_equal_trls_on_trls_rewards_and_positions(ppo_run):
    batch = ppo_run(1)["batch"]
    longer = rollouts_of(batch, ~batch["padding_mask_p1"])  # TRL's rows have one step more than tokens
    got = advantages.gae(GAMMA, LAMBDA)(batch["rewards"], segments.tokens()(longer), longer)
    assert_same(got.advantages, batch["returns"] - batch["values"], 1e-5)
    assert_same(got.returns, batch["returns"], 1e-5)
    assert_same(whiten(got.advantages, ~batch["padding_mask"]), batch["advantages"], 1e-5)


def test_gae_on_our_rewards_differs_by_the_value_of_the_pad_alone(ppo_run):
    """TRL bootstraps from the value after EOS, then takes it back one step later: γ·λ's share of it remains."""
    batch = ppo_run(1)["batch"]
    mask = ~batch["padding_mask"]
    rollouts = rollouts_of(batch, mask)
    rewards, _ = credit.apply(credit.chain(credit.sparse(), credit.kl_penalty(coef=KAPPA)), rollouts)
    ours = advantages.gae(GAMMA, LAMBDA)(rewards, segments.tokens()(rollouts), rollouts).advantages
    theirs = batch["returns"] - batch["values"]
    for row in range(len(mask)):
        n = int(mask[row].sum())
        if n == mask.shape[1]:
            assert_same(ours[row], theirs[row], 1e-5)
            continue
        score, pad = batch["scores"][row], batch["values"][row, n]
        # last step here: + score. There: γ·V(pad) and, one step on, γλ·(score − V(pad))
        gap = GAMMA * pad + GAMMA * LAMBDA * (score - pad) - score
        fading = (GAMMA * LAMBDA) ** torch.arange(n - 1, -1, -1)
        assert_same(theirs[row, :n] - ours[row, :n], gap * fading, 2e-5)


def test_policy_and_value_losses_and_their_gradients_equal_trls(ppo_run):
    record = ppo_run(1)
    batch = record["batch"]
    assert len(record["steps"]) == 3
    for step in record["steps"]:
        rows = step["micro_batch_inds"].long()
        mask, longer = ~batch["padding_mask"][rows], ~batch["padding_mask_p1"][rows]
        rollouts = rollouts_of({k: v[rows] for k, v in batch.items()}, mask)
        new, values = step["new_logprobs"].requires_grad_(), step["vpred"].requires_grad_()
        method = losses.ppo(clip=CLIP)
        ids = segments.tokens()(rollouts)
        policy, sums = method.terms(new, rollouts, step["mb_advantage"], mask, ids)
        policy = policy / method.denominator(mask, ids)
        value, _ = losses.clipped_value(values, step["mb_values"], step["mb_return"], longer, clip=VALUE_CLIP)
        value = value / longer.sum()  # TRL regresses the value of the pad after EOS too
        assert_same(policy, step["pg_loss"])
        assert_same(value, step["vf_loss"])
        assert_same(policy + VALUE_COEF * value, step["loss"])
        policy_grad, value_grad = torch.autograd.grad(policy + VALUE_COEF * value, [new, values])
        assert_same(policy_grad, step["policy_grad"])
        assert_same(value_grad, step["value_grad"])
        assert float(sums["val/ratio"]) > 0
    assert record["steps"][-1]["policy_grad"].abs().max() > 1e-3


def test_approxkl_and_the_ratio_are_averaged_over_padding_by_trl(ppo_run):
    record = ppo_run(1)
    batch, kl, ratio, clipped = record["batch"], [], [], []
    for step in record["steps"]:
        rows = step["micro_batch_inds"].long()
        mask = ~batch["padding_mask"][rows]
        _, sums = losses.clipped_policy(
            step["new_logprobs"], step["mb_logprobs"], step["mb_advantage"], mask, clip=CLIP
        )
        gap = torch.where(mask, step["new_logprobs"] - step["mb_logprobs"], 0.0)
        kl.append(0.5 * (gap**2).sum().item() / mask.numel())  # k2, and the padding in the denominator
        ratio.append(float(sums["val/ratio"] + (~mask).sum()) / mask.numel())  # padding has ratio 1
        clipped.append(float(sums["policy/clipfrac"] / mask.sum()))
    log = record["log"]
    assert log["policy/approxkl_avg"] == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert log["val/ratio"] == pytest.approx(sum(ratio) / len(ratio), rel=1e-5)
    assert log["policy/clipfrac_avg"] == pytest.approx(sum(clipped) / len(clipped), rel=1e-5)


def test_trl_divides_each_micro_batch_by_its_own_tokens_and_we_the_whole(ppo_run):
    """Where micro-batches differ in tokens, the mean of their means is not the mean over the mini-batch."""
    record = ppo_run(4)
    batch, steps = record["batch"], record["steps"][4:8]
    tokens = [int((~batch["padding_mask"][s["micro_batch_inds"].long()]).sum()) for s in steps]
    assert len(set(tokens)) > 1
    method, whole = losses.ppo(clip=CLIP), 0.0
    for step, count in zip(steps, tokens, strict=True):
        rows = step["micro_batch_inds"].long()
        mask = ~batch["padding_mask"][rows]
        rollouts = rollouts_of({k: v[rows] for k, v in batch.items()}, mask)
        ids = segments.tokens()(rollouts)
        loss, _ = method.terms(step["new_logprobs"], rollouts, step["mb_advantage"], mask, ids)
        assert_same(loss / count, step["pg_loss"])
        whole = whole + loss / sum(tokens)
    theirs = torch.stack([s["pg_loss"] for s in steps]).mean()
    assert (whole - theirs).abs() > 1e-4, "these micro-batches cannot tell"


# --- the GRPO family of TRL 1.16.0, and GSPO's token form of 1.12.0 ---------------------------------------------------

Case = tuple[str, str, dict[str, Any], Callable[[], PolicyLoss], str]
WIDE = {"epsilon_low": 0.05, "epsilon_high": 0.08}
CASES: dict[str, Case] = {  # name: (TRL, trainer, its settings, ours, what one advantage covers)
    "grpo": ("1.16.0", "grpo", {}, losses.grpo, "token"),
    "grpo with KL": ("1.16.0", "grpo", {"beta": 0.3}, lambda: losses.grpo(kl_coef=0.3), "row"),
    "dr_grpo": ("1.16.0", "grpo", {"loss_type": "dr_grpo"}, lambda: losses.dr_grpo(length=12), "row"),
    "dapo": ("1.16.0", "grpo", {"loss_type": "dapo", "epsilon_high": 0.28}, losses.dapo, "token"),
    "bnpo is token PPO": ("1.16.0", "grpo", {"loss_type": "bnpo"}, losses.ppo, "token"),
    "gspo": (
        "1.16.0",
        "grpo",
        {"importance_sampling_level": "sequence", **WIDE},
        lambda: losses.gspo(0.05, 0.08),
        "row",
    ),
    "gspo, token form": (
        "1.12.0",
        "gspo_token",
        {"importance_sampling_level": "sequence_token", **WIDE},
        lambda: losses.gspo(0.05, 0.08, token=True),
        "token",
    ),
    # TRL's epsilon_high is the bound itself, ours what it exceeds 1 by
    "cispo": ("1.16.0", "grpo", {"loss_type": "cispo", "epsilon_high": 1.3}, lambda: losses.cispo(1.0, 0.3), "token"),
    "rloo": ("1.16.0", "rloo", {}, lambda: losses.ppo(ratio="action"), "row"),
}


def numbers(per: str) -> dict[str, Tensor]:
    """Return log-probabilities and advantages of 6 ragged rows in float64; one advantage a row or a token."""
    generator = torch.Generator().manual_seed(5)

    def noise(size: float) -> Tensor:
        return size * torch.randn(6, 8, generator=generator, dtype=torch.float64)

    mask = torch.arange(8) < torch.tensor([8, 3, 5, 1, 7, 4])[:, None]
    old, adv = noise(1.0) - 2, noise(1.0)
    return {
        "mask": mask,
        "old_logprobs": old,
        "logprobs": old + noise(0.15),
        "reference_logprobs": old + noise(0.2),
        "advantages": adv[:, 0] if per == "row" else adv,
    }


@pytest.fixture(scope="session")
def trl_losses(released: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return (loss, gradient, metrics) of every case as TRL computes them."""
    found: dict[str, Any] = {}
    for version in ("1.16.0", "1.12.0"):
        names = [n for n, case in CASES.items() if case[0] == version]
        folder = tmp_path_factory.mktemp("grpo")
        given = [{"kind": CASES[n][1], "settings": CASES[n][2], **numbers(CASES[n][4])} for n in names]
        torch.save(given, folder / "in.pt")
        call("trl_grpo.py", released(version), folder / "in.pt", folder / "out.pt")
        found |= dict(zip(names, torch.load(folder / "out.pt"), strict=True))
    return found


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_equal_trls(trl_losses, name):
    loss, grad, metrics = trl_losses[name]
    *_, make, per = CASES[name]
    given, method = numbers(per), make()
    mask = given["mask"]
    rollouts = helpers.rollouts(
        mask,
        ["reference_logprobs"],
        logprobs=given["old_logprobs"],
        reference_logprobs=given["reference_logprobs"],
    )
    adv = given["advantages"] if per == "token" else given["advantages"][:, None].expand(mask.shape)
    ids = torch.where(mask, 0, -1) if method.ratio == "action" else segments.tokens()(rollouts)
    logprobs = given["logprobs"].requires_grad_()
    ours, sums = method.terms(logprobs, rollouts, adv, mask, ids)
    ours = ours / method.denominator(mask, ids)
    torch.testing.assert_close(ours.detach(), loss, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(ours, logprobs)[0], grad, rtol=0, atol=1e-9)
    if name in ("grpo", "dapo", "bnpo is token PPO"):
        share = float(sums["policy/clipfrac"] / mask.sum())
        assert metrics["clip_ratio/region_mean"] == pytest.approx([share]) and 0 < share < 1
    if "KL" in name:
        assert metrics["kl"] == pytest.approx([float(sums["policy/reference_kl"] / mask.sum())])
