"""ABC-PPO in one file of plain PyTorch. Read the comments 1 to 24 and you have followed one batch.

    python examples/ppo_from_scratch.py --reward_model runs/demo/reward/final --steps 3

This file computes what `apportion rl --dtype float32` computes with the same settings and seed: every metric of the
algorithm is equal to 1e-5 (tests/equivalence/test_ppo_from_scratch.py). The whole algorithm is here; apportion is
imported only to find a model's folder and to read prompts. `apportion rl` adds the other methods, faster sampling and
updates, bfloat16, several processes, checkpoints, monitors and logs.

What this file needs: prompts that are text, a policy whose attention layers have Llama's names, and a decoder as the
reward model, with the policy's tokenizer and one label, or two of which the second is the good one.

Shapes: B rollouts, P prompt tokens, T response tokens, V vocabulary entries, H heads. Prompts are padded on the left,
responses on the right. Column t of a (B,T) tensor belongs to response token t; values[:, t] is the value before it.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, DynamicCache

from apportion.data import prompts as read_prompts
from apportion.models.loading import locate

PROMPT_TOKENS = "keep the first n tokens of each prompt, n from LOW to HIGH [sampling.prompt_tokens]"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage="%(prog)s --reward_model FOLDER [settings]",
        description="Train a policy with ABC-PPO. One batch: sample a response to each prompt; score it with a reward "
        "model; spread the score over the tokens by the reward model's attention; subtract the KL penalty; estimate "
        "advantages with GAE; take clipped PPO steps. Each batch prints one line.",
        epilog="The name in brackets is the same setting of `apportion rl`, with the same default.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--policy", default="smollm2", help="model to train, and the reference: smollm2, a folder or a hub id [policy]")
    add("--reward_model", required=True, default=argparse.SUPPRESS, help="classifier that gives scores [reward_model]")
    add("--prompts", default="imdb", help="imdb, or a file with a column prompt or text [prompts]")
    add("--prompt_tokens", type=int, nargs=2, metavar=("LOW", "HIGH"), default=[4, 8], help=PROMPT_TOKENS)
    add("--steps", type=int, default=40, help="batches to train on [steps]")
    add("--seed", type=int, default=0, help="seed of prompts, sampling, adapters and mini-batches [seed]")
    add("--batch_size", type=int, default=32, help="B, the rollouts of one batch [sampling.batch_size]")
    add("--max_new_tokens", type=int, default=24, help="longest response [sampling.max_new_tokens]")
    add("--stop", choices=["length", "eos"], default="length", help="where a response ends [sampling.stop]")
    add("--temperature", type=float, default=1.0, help="divides the logits everywhere [sampling.temperature]")
    add("--beta", type=float, default=0.8, help="share of the score that attention spreads [attention's mix]")
    add("--kl_coef", type=float, default=0.12, help="initial κ of the KL penalty [kl_penalty's coef]")
    add("--kl_target", type=float, default=8.0, help="KL that κ aims at, nats a response [kl_penalty's target]")
    add("--kl_horizon", type=float, default=400, help="how slowly κ moves, rollouts [kl_penalty's horizon]")
    add("--gamma", type=float, default=1.0, help="discount γ [gae's gamma]")
    add("--lam", type=float, default=0.95, help="λ of GAE [gae's lam]")
    add("--clip", type=float, default=0.2, help="ε: clip of the policy ratio [ppo's clip]")
    add("--value_clip", type=float, default=0.2, help="clip of the values [ppo.value_clip]")
    add("--value_coef", type=float, default=0.1, help="weight of the value loss [ppo.value_coef]")
    add("--epochs", type=int, default=4, help="passes over each batch [ppo.epochs]")
    add("--mini_batch", type=int, default=16, help="rollouts of one optimizer step [ppo.mini_batch]")
    add("--lora_rank", type=int, default=16, help="rank of the adapters [lora.rank]")
    add("--lora_alpha", type=float, default=32.0, help="adapters are scaled by alpha/rank [lora.alpha]")
    add("--lr", type=float, default=5e-4, help="peak learning rate [optim.lr]")
    add("--warmup", type=float, default=0.05, help="share of the steps in which it rises [optim.warmup]")
    add("--max_grad_norm", type=float, default=1.0, help="clip of the gradient's norm [optim.max_grad_norm]")
    return parser.parse_args(argv)


def join(prompt_ids, prompt_mask, response_ids, mask):
    """Return the model inputs (B,P+T) of prompts and responses; positions count real tokens, so padding is unseen."""
    seen = torch.cat([prompt_mask, mask], dim=1).long()
    ids = torch.cat([prompt_ids, response_ids], dim=1)
    return {"input_ids": ids, "attention_mask": seen, "position_ids": (seen.cumsum(dim=1) - 1).clamp_min(0)}


def distribution(logits, banned, temperature):
    """Return the logits that tokens are sampled from: over the temperature, −inf for banned tokens."""
    return (logits / temperature).index_fill(-1, banned, -torch.inf)


def evaluate(model, value_head, rule, inputs, response_ids, mask):
    """Return log π(token), values and entropies of the responses, (B,T) each, 0 off the mask, from one forward."""
    T = response_ids.shape[1]
    out = model(**inputs, output_hidden_states=True, logits_to_keep=T + 1, use_cache=False)
    logits = distribution(out.logits[:, :-1], *rule)  # (B,T,V), before each token
    total = logits.logsumexp(dim=-1, keepdim=True)  # log_softmax in float32 is off by 2e-5 where V is 49,152
    logprobs = (logits.gather(-1, response_ids[..., None]) - total).squeeze(-1)
    values = value_head(out.hidden_states[-1][:, -T - 1 : -1]).squeeze(-1)
    with torch.no_grad():
        entropy = torch.special.entr((logits - total).exp()).sum(dim=-1)  # Σ −p·log p, where 0·log 0 is 0
    return [torch.where(mask, x, 0.0) for x in (logprobs, values, entropy)]


def train(args):
    """Train for args.steps batches and return the metrics of each as a dict."""
    # 1. Two random states. The global one initialises the adapters; `generator` draws all that happens in training.
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    # 2. The models. Eager attention, because the reward model has to output its attention weights.
    folder, float32 = locate("policy", args.policy), {"dtype": torch.float32, "attn_implementation": "eager"}
    reward_folder = locate("reward_model", args.reward_model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reward_model = AutoModelForSequenceClassification.from_pretrained(reward_folder, **float32).eval()
    reward_model.config.pad_token_id = tokenizer.pad_token_id
    policy = AutoModelForCausalLM.from_pretrained(folder, **float32)

    # 3. LoRA on the attention projections. With its adapters disabled, the policy is the reference.
    layers = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=0.0, target_modules=layers)
    policy = get_peft_model(policy, lora).eval()  # dropout stays off in training too

    # 4. The value head: one linear layer on the policy's last hidden states, initially 0.
    value_head = nn.Linear(policy.config.hidden_size, 1)
    nn.init.zeros_(value_head.weight)
    nn.init.zeros_(value_head.bias)
    parameters = [p for p in policy.parameters() if p.requires_grad] + list(value_head.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.lr, eps=1e-5)

    # 5. The rule of sampling: padding is never sampled, nor is EOS if every response has the full length; temperature.
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    assert pad is not None and pad != eos, "the policy's tokenizer needs a pad token that is not EOS"
    rule = (torch.tensor([pad, eos] if args.stop == "length" else [pad]), args.temperature)

    # 6. The prompts, and how many tokens of each are kept.
    texts = read_prompts(args.prompts, "rl" if args.prompts == "imdb" else None)
    low, high = args.prompt_tokens
    cuts = torch.randint(low, high + 1, (len(texts),), generator=torch.Generator().manual_seed(args.seed))

    kl_coef, history = args.kl_coef, []
    for step in range(args.steps):
        # 7. The next B prompts; each pass over all prompts has its own order.
        rows = []
        for i in range(step * args.batch_size, (step + 1) * args.batch_size):
            epoch, place = divmod(i, len(texts))
            shuffle = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            prompt = torch.randperm(len(texts), generator=shuffle)[place]
            rows.append(tokenizer(texts[prompt])["input_ids"][: cuts[prompt]])
        padded = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        prompt_ids, prompt_mask = padded["input_ids"], padded["attention_mask"].bool()  # (B,P)
        B, P = prompt_ids.shape

        # 8. Sample one response to each prompt, and keep log π of each token. The sampled token is the first whose
        #    cumulative probability exceeds a uniform number. All uniform numbers of a batch are drawn beforehand.
        uniforms = torch.rand(B, args.max_new_tokens, dtype=torch.float64, generator=generator)
        response_ids, mask, logprobs = prompt_ids[:, :0], prompt_mask[:, :0], torch.zeros(B, 0)
        alive, cache = torch.ones(B, 1, dtype=torch.bool), DynamicCache()
        while response_ids.shape[1] < args.max_new_tokens and alive.any():
            inputs, known = join(prompt_ids, prompt_mask, response_ids, mask), cache.get_seq_length()
            new = {name: inputs[name][:, known:] for name in ("input_ids", "position_ids")}
            with torch.no_grad():
                out = policy(**inputs | new, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logp = distribution(out.logits[:, -1].double(), *rule).log_softmax(dim=-1)  # (B,V)
            cdf = logp.exp().cumsum(dim=-1)
            uniform = uniforms[:, [response_ids.shape[1]]] * cdf[:, [-1]]
            token = torch.where(alive, torch.searchsorted(cdf, uniform, right=True), pad)  # (B,1)
            logprobs = torch.cat([logprobs, torch.where(alive, logp.gather(1, token).float(), 0.0)], dim=1)
            response_ids, mask = torch.cat([response_ids, token], dim=1), torch.cat([mask, alive], dim=1)
            alive = alive & (token != eos)  # EOS itself is part of the response

        # 9. The policy reads the responses in one forward, as it will in training: log π_old, values, entropies.
        inputs = join(prompt_ids, prompt_mask, response_ids, mask)
        batch = (inputs, response_ids, mask)
        with torch.no_grad():
            old_logprobs, values, entropy = evaluate(policy, value_head, rule, *batch)

            # 10. The reference: log π_ref of the same tokens.
            with policy.disable_adapter():
                ref_logprobs, _, _ = evaluate(policy, value_head, rule, *batch)

            # 11. The reward model: one score R a response. With two labels R = logit(positive) − logit(negative).
            out = reward_model(**inputs, output_attentions=True)
            scores = out.logits[:, 0] if out.logits.shape[1] == 1 else out.logits[:, 1] - out.logits[:, 0]  # (B,)

        # 12. α: the reward model's attention in its last layer, averaged over heads, from the position where it reads
        #     the score (the last token of the response) to each response token, divided by its sum over the response.
        last = mask.sum(dim=1) - 1  # (B,)
        row = out.attentions[-1][torch.arange(B), :, P + last].mean(dim=1)  # (B,H,P+T) -> (B,P+T)
        attention = torch.where(mask, row[:, P:], 0.0)
        alpha = attention / attention.sum(dim=1, keepdim=True)  # (B,T)

        # 13. ABC's reward: r_t = β·α_t·R + (1−β)·R·1[t=last] − κ·(log π − log π_ref). It is 0 after the last token.
        R, is_last = scores[:, None], F.one_hot(last, mask.shape[1])
        kl = logprobs - ref_logprobs
        rewards = args.beta * alpha * R + (1 - args.beta) * R * is_last - kl_coef * kl  # (B,T)

        # 14. GAE, from the last column back. Rewards and values are 0 after the last token, so advantages are too.
        deltas = rewards + args.gamma * F.pad(values, (0, 1))[:, 1:] - values
        advantages, running = torch.zeros_like(deltas), torch.zeros(B)
        for t in reversed(range(mask.shape[1])):
            running = deltas[:, t] + args.gamma * args.lam * running
            advantages[:, t] = running

        # 15. Returns are the targets of the values. They come before whitening.
        returns = advantages + values

        # 16. Whiten the advantages over all tokens of the batch.
        advantages = (advantages - advantages[mask].mean()) / (advantages[mask].var() + 1e-8).sqrt()

        # 17. The learning rate of this batch: up linearly during the warm-up, then down linearly to 0.
        rise = max(1, round(args.warmup * args.steps))
        scale = (step + 1) / rise if step < rise else (args.steps - step) / max(1, args.steps - rise)
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, scale)

        # 18. Learn from the batch several times, each time in mini-batches of a fresh permutation.
        updates = []
        for _ in range(args.epochs):
            for mini in torch.randperm(B, generator=generator).split(args.mini_batch):
                # 19. One forward of the current policy on the mini-batch; [m] picks its real tokens.
                m, part = mask[mini], {name: x[mini] for name, x in inputs.items()}
                new_logprobs, new_values, _ = evaluate(policy, value_head, rule, part, response_ids[mini], m)
                A, G, V_old = advantages[mini][m], returns[mini][m], values[mini][m]
                V, log_ratio = new_values[m], (new_logprobs - old_logprobs[mini])[m]
                ratio = log_ratio.exp()

                # 20. The clipped policy loss, a mean over tokens.
                plain, clipped = -A * ratio, -A * ratio.clamp(1 - args.clip, 1 + args.clip)
                policy_loss = torch.maximum(plain, clipped).mean()

                # 21. The clipped value loss, a mean over tokens.
                V_near = V_old + (V - V_old).clamp(-args.value_clip, args.value_clip)
                value_loss = 0.5 * torch.maximum((V - G) ** 2, (V_near - G) ** 2).mean()

                # 22. One optimizer step.
                optimizer.zero_grad()
                (policy_loss + args.value_coef * value_loss).backward()
                grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                too_far = (V - V_old).abs() > args.value_clip
                metrics = {
                    "loss/policy": policy_loss,
                    "loss/value": value_loss,
                    "loss/value_clipfrac": (too_far & ((V_near - G) ** 2 > (V - G) ** 2)).float().mean(),
                    "policy/approxkl": (ratio - 1 - log_ratio).mean(),
                    "policy/clipfrac": (clipped > plain).float().mean(),
                    "policy/grad_norm": grad_norm,
                    "val/ratio": ratio.mean(),
                }
                updates.append({name: float(value.detach()) for name, value in metrics.items()})

        # 23. Move κ once a batch: up where the KL of the batch is above the target, down where it is below.
        kl_of_batch = kl.sum(dim=1).mean()  # nats a response
        kl_coef *= 1 + float((kl_of_batch / args.kl_target - 1).clamp(-0.2, 0.2)) * B / args.kl_horizon

        # 24. The metrics of the batch; those of the updates are means over the optimizer steps.
        metrics = {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
        metrics |= {
            "objective/scores": scores.mean(),
            "objective/scores_std": scores.std(unbiased=False),
            "objective/rewards": rewards.sum(dim=1).mean(),
            "objective/kl": kl_of_batch,
            "objective/entropy": entropy[mask].mean(),
            "objective/length": mask.sum(dim=1).float().mean(),
            "objective/ended": (response_ids == eos).any(dim=1).float().mean(),
            "sampling/logprob_gap": (logprobs - old_logprobs)[mask].abs().mean(),
            "segments/actions": mask.sum(dim=1).float().mean(),  # each token is an action
            "credit/kept_mass": attention.sum(dim=1).mean(),
            "credit/max_share": alpha.amax(dim=1).mean(),
            "credit/share_entropy": torch.special.entr(alpha).sum(dim=1).mean(),
            "kl/coef": kl_coef,
            "policy/lr": optimizer.param_groups[0]["lr"],
            "advantage/first_token": advantages[:, 0].mean(),
        }

        # 25. Where the advantages lie: a mean in each quarter of the responses; and, of those that ended by themselves,
        #     the end token's advantage and its correlation with the length, which shows the bias of spread credit.
        length, ended = mask.sum(dim=1), (response_ids == eos).any(dim=1)
        quarter = 4 * (mask.cumsum(dim=1) - 1) // length[:, None]
        parts = {f"advantage/quarter_{i + 1}": advantages[mask & (quarter == i)] for i in range(4)}
        parts["advantage/end_token"] = end = advantages[torch.arange(B), last][ended]
        metrics |= {name: part.mean() for name, part in parts.items() if len(part)}
        if len(end) >= 12 and len(length[ended].unique()) > 1:
            metrics["advantage/end_token_length_corr"] = torch.corrcoef(torch.stack([end, length[ended].float()]))[0, 1]
        history.append({name: float(value) for name, value in metrics.items()})
        shown = ("objective/scores", "objective/kl", "objective/entropy", "loss/policy", "loss/value")
        line = "  ".join(f"{name} {history[-1][name]:.4f}" for name in shown)
        print(f"batch {step + 1}/{args.steps}  {line}", flush=True)  # noqa: T201
    return history


def main(argv=None):
    return train(parse_args(argv))


if __name__ == "__main__":
    main()
