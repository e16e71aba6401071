"""The pure core in a plain PyTorch loop: a toy policy is trained on tokens 3 and 7; no model library is loaded."""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor, nn

from apportion import Rollouts, advantages, credit, segments
from apportion.losses import clipped_policy, clipped_value
from apportion.masking import whiten

VOCAB, LENGTH, BATCH, STEPS = 12, 16, 64, 40


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(VOCAB + 1, 32), nn.GRU(32, 32, batch_first=True)
        self.head, self.value = nn.Linear(32, VOCAB), nn.Linear(32, 1)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (B,T,V), (B,T), (B,T)
        states = self.rnn(self.embed(nn.functional.pad(tokens, (1, 0), value=VOCAB)[:, :-1]))[0]
        logp = self.head(states).log_softmax(-1)
        return logp, logp.gather(-1, tokens[..., None]).squeeze(-1), self.value(states).squeeze(-1)


def main(name: str = "attention") -> None:
    torch.manual_seed(0)
    policy, tokens, mask = Toy(), torch.zeros(BATCH, LENGTH).long(), torch.ones(BATCH, LENGTH).bool()
    reference, optimizer = copy.deepcopy(policy), torch.optim.Adam(policy.parameters(), lr=3e-3)
    method = credit.chain(credit.find(name)(), credit.kl_penalty())
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for t in range(LENGTH):
                tokens[:, t] = policy(tokens)[0][:, t].exp().multinomial(1).squeeze(1)
            (_, old, values), (_, ref, _) = policy(tokens), reference(tokens)
        liked = ((tokens == 3) | (tokens == 7)).float()  # in place of a reward model: its score and its attention
        seen = {"values": values, "reference_logprobs": ref, "reward_attention": 0.1 + liked}
        prompt = {"prompt_ids": tokens[:, :0], "prompt_mask": mask[:, :0], "group": torch.arange(BATCH)}
        response = {"response_ids": tokens, "mask": mask, "logprobs": old, "scores": liked.sum(dim=1)}
        rollouts = Rollouts(**prompt, **response, evidence=seen)
        rewards, _ = credit.apply(method, rollouts)  # (B,T)
        advantage, returns = advantages.gae()(rewards, segments.tokens()(rollouts), rollouts)
        for _ in range(4):
            _, new, guess = policy(tokens)
            loss = clipped_policy(new, old, whiten(advantage, mask), mask)[0]
            optimizer.zero_grad()
            ((loss + 0.1 * clipped_value(guess, values, returns, mask)[0]) / mask.sum()).backward()
            optimizer.step()
        if step == 1 or step % 10 == 0:
            print(f"{name}, step {step}: score {liked.sum(dim=1).mean():.2f} of {LENGTH}")  # noqa: T201


if __name__ == "__main__":  # python examples/own_loop.py [sparse | uniform | attention]
    main(*sys.argv[1:])
