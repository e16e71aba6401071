"""`exclude_self` leaves out the column of the position that reads the score, where that is a response token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import foreign_models
import pytest
import tiny_models
import tiny_runs
import torch
from foreign_models import SAID, batch_of, judge

from apportion.evidence.reward import reward_evidence
from apportion.evidence.text_reward import translate
from apportion.models.reward import RewardModel
from apportion.models.text.transfer import transfer
from apportion.registry import EvidenceKey

PLAIN = EvidenceKey("reward_attention")
WITHOUT = EvidenceKey("reward_attention", exclude_self=True)
BOTH = frozenset({"scores", PLAIN, WITHOUT})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign_models.world(tmp_path_factory.mktemp("world"))


def test_a_decoder_reads_at_the_last_token_of_a_response() -> None:
    """The only token of a response keeps its attention; tokens after the last sampled one are what reads the score."""
    reward = RewardModel(tiny_models.build("gpt2"), None)
    batch = tiny_runs.rollouts_of([[5, 6], [7], [8, 9]], [[50, 60, 70], [80], [81, 82, 83]], extra=1)
    tool = batch.mask.clone()
    tool[2, 2] = False  # a tool's output, which the model attends to
    found = reward_evidence(reward, replace(batch, mask=tool), BOTH)
    expected = found[PLAIN].clone()
    expected[0, 2] = expected[2, 2] = 0.0
    assert torch.equal(found[WITHOUT], expected) and (found[PLAIN][[0, 1, 2], [2, 0, 2]] > 0).all()


def test_an_encoder_reads_at_a_token_that_is_not_of_the_response(world: Path) -> None:
    found = reward_evidence(judge(world, "encoder"), batch_of(SAID), BOTH)
    assert torch.equal(found[WITHOUT], found[PLAIN]) and (found[PLAIN].sum(dim=1) > 0).all()


@pytest.mark.parametrize("eos", [True, False])
def test_a_decoder_with_its_own_tokenizer_loses_the_column_that_reads(world: Path, eos: bool) -> None:
    """The policy's EOS has no characters, so that its last token of text is what reads the score."""
    reward, batch = judge(world, "other"), batch_of(SAID, eos=eos)
    found = reward_evidence(reward, batch, BOTH)
    theirs = translate(reward, batch)
    own = theirs.rollouts
    row = reward.score(own.response_ids, own.mask, attention=True)[1]
    assert row is not None
    for i in range(len(batch)):
        row[i, int(own.mask[i].sum()) - 1] = 0.0
    expected = transfer(row, theirs.source, theirs.target)
    single = batch.valid.sum(dim=1) == 1
    torch.testing.assert_close(found[WITHOUT][~single], expected[~single])
    torch.testing.assert_close(found[WITHOUT][single], found[PLAIN][single])
    assert (found[PLAIN].sum(dim=1) - found[WITHOUT].sum(dim=1) > 1e-4)[~single].all()


def test_a_template_that_ends_the_turn_reads_outside_the_response(world: Path) -> None:
    batch = batch_of([("hello", "a film, I said")], eos=False)
    prompt = tuple(tiny_runs.alone(batch, 0)[0])
    reward = judge(world, "chat", conversations={prompt: foreign_models.CHAT})
    found = reward_evidence(reward, batch, BOTH)
    assert torch.equal(found[WITHOUT], found[PLAIN])
