"""More runs with one fault each, in the text of prompts: beginnings, ends, templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import tiny_tokenizers
from foreign_models import BRACKETS, encoder, save_model
from planted import ASKS, TURNS, Planted, conversations, judge, policy, settings_of, texts, tokenizer_of
from tokenizers.processors import TemplateProcessing

ENDED = TURNS.replace("{END}", "<eos>")
ENDING = TURNS.replace("{END}", "<unk>") + ASKS
SAME = [f"Say in a few words of your own how you liked the film number {i}." for i in range(8)]


def with_end(world: Path, folder: Path) -> Path:
    """Return a policy whose tokenizer ends every text with EOS, as add_eos_token has it."""
    made = tiny.tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return tokenizer_of(policy(world, folder / "policy"), made)


def short(folder: Path, positions: int, chars: int) -> dict[str, object]:
    """Return the flags of a run whose reward model has `positions` positions, with a prompt of `chars` characters."""
    made = save_model(folder / "judge", tiny_tokenizers.wordpiece(), encoder(max_position_embeddings=positions))
    return {"reward_model": made, **texts(folder, ["a film", tiny.TEXTS[0][:chars]])}


def chatty(folder: Path, template: str) -> Path:
    """Return a reward model of the policy's vocabulary with a chat template, not trained by `apportion reward`."""
    made = tiny.tokenizer()
    made.chat_template = template
    return tokenizer_of(tiny.save_reward(folder / "judge", labels=1), made)


def reward_run_with(world: Path, folder: Path, **settings: Any) -> Path:
    """Return a reward model in a run folder with changed settings."""
    final = judge(world, folder / "judge")
    (final.parent / "config.yaml").write_text("".join(f"{k}: {v}\n" for k, v in {"excerpts": 10, **settings}.items()))
    return final


PLANTED: dict[str, Planted] = {
    "conversations cut to their first tokens": Planted(
        lambda w, f: conversations(w, f, ENDED + ASKS) | {"sampling.prompt_tokens": "[4,8]"},
        "chat template", "fail", ("4 conversations are cut to their first 4 to 8 tokens", "prompt_tokens to null"),
    ),
    "openings that are alike": Planted(
        lambda w, f: texts(f, SAME) | {"sampling.prompt_tokens": "[4,5]"}, "duplicates", "warn",
        ("6 of 8 have the same first 4 to 5 tokens", "prompt_tokens to null"),
    ),
    "prompts that end": Planted(
        lambda w, f: {"policy": with_end(w, f), **texts(f, ["a film", "a story"])}, "prompt tokens", "fail",
        ("2 of 2 end with EOS '<eos>'", "Set add_eos_token to false, and save the tokenizer again"),
    ),
    "EOS at the end of a text": Planted(
        lambda w, f: texts(f, ["a film<eos>", "a story"]), "prompt tokens", "warn", ("1 of 2 end with EOS", "Remove it")
    ),
    "markers and no generation prompt": Planted(
        lambda w, f: conversations(w, f, TURNS.replace("{END}", "<|end|>")), "chat template", "warn",
        ("no generation prompt; markers", "<|end|>", "add_generation_prompt", "special tokens"),
    ),
    "long prompts for the reward model": Planted(
        lambda w, f: short(f, 24, 80), "reward tokenizer", "warn", ("of its 24", "lower sampling.max_new_tokens")
    ),
    "too long prompts for the reward model": Planted(
        lambda w, f: short(f, 12, 80), "reward tokenizer", "fail", ("of its 12", "Shorten the prompts")
    ),
    "plain prompts for a reward model of conversations": Planted(
        lambda w, f: {"reward_model": chatty(f, BRACKETS)}, "reward tokenizer", "warn",
        ("prompts are plain text", "Give prompts as conversations"),
    ),
    "another template than the reward model's": Planted(
        lambda w, f: conversations(w, f, ENDED + ASKS, reward_model=chatty(f, BRACKETS)),
        "reward tokenizer", "warn", ("a chat template of its own", "for both"),
    ),
    "generation settings that are no ids": Planted(
        lambda w, f: {"policy": settings_of(policy(w, f / "m"), "generation_config.json", eos_token_id=2.5)}, "policy",
        "fail", ("generation_config.json: got 2.5", "Fix it there"),
    ),
    "generation settings that cannot be": Planted(
        lambda w, f: {"policy": settings_of(policy(w, f / "m"), "generation_config.json", max_new_tokens=-1)}, "policy",
        "fail", ("generation_config.json: got", "max_new_tokens", "Fix it"),
    ),
    "reward model that names a hub set": Planted(
        lambda w, f: {"reward_model": reward_run_with(w, f, data="nobody/none")}, "reward data", "warn",
        ("data: got 'nobody/none'", "Nothing else is read"),
    ),
    "reward model's settings that cannot be": Planted(
        lambda w, f: {"reward_model": reward_run_with(w, f, lora=3)}, "reward data", "warn", ("be read: ", "a mapping")
    ),
    "reward model's settings that are no YAML": Planted(
        lambda w, f: {"reward_model": reward_run_with(w, f, data="[")}, "reward data", "warn", ("cannot be read: ",)
    ),
}  # fmt: skip
