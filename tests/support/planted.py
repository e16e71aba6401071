"""Runs with one fault each (models, tokenizers, data, settings), and the finding of `apportion doctor` for each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tiny
import tiny_runs
import torch
from broken_models import changed
from foreign_models import save_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig

Flags = Mapping[str, object]
JUDGE = {"excerpts": 600, "excerpt_tokens": "[8,24]", "batch_size": 16, "optim.lr": 3e-3, "test_texts": 20}
CHAT = [{"role": "user", "content": text} for text in tiny.TEXTS]
TURNS = "{% for m in messages %}<eos>{{ m.role }}\n{{ m.content }}{END}\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<eos>assistant\n{% endif %}"


def good(folder: Path) -> Path:
    """Write a world whose reward model was trained by `apportion reward`, so that every check can be asked."""
    from apportion.cli.main import main

    tiny_runs.world(folder)
    words = " ".join(tiny.TEXTS).split()
    rows(folder / "prompts.jsonl", [" ".join(words[2 * i : 2 * i + 9]) for i in range(24)])  # each begins otherwise
    settings = {"model": folder / "policy", "data": folder / "reviews.csv", "output": folder / "judge", **JUDGE}
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    assert main(["reward", *words, "--dtype", "float32", "--device", "cpu"]) == 0
    return folder


def flags(folder: Path, **changes: object) -> list[str]:
    """Return the flags of a run in a good world."""
    return tiny_runs.flags(folder, **{"reward_model": folder / "judge" / "final", **changes})


def policy(world: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], object] | None = None) -> Path:
    """Return a copy of the policy, with its weights changed."""
    shutil.copytree(world / "policy", to)
    if change is not None:
        changed(to, change)
    return to


def judge(world: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], object] | None = None) -> Path:
    """Return a copy of the reward model in its run folder, with its weights changed."""
    shutil.copytree(world / "judge", to)
    if change is not None:
        changed(to / "final", change)
    return to / "final"


def settings_of(model: Path, file: str = "config.json", **settings: Any) -> Path:
    """Change settings in a file of a model folder, which is returned."""
    stored = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps(stored | settings))
    return model


def tokenizer_of(model: Path, tokenizer: Any) -> Path:
    """Give a model folder another tokenizer."""
    tokenizer.save_pretrained(model)
    return model


def rows(path: Path, values: list[Any]) -> Path:
    """Write prompts as JSON lines."""
    path.write_text("".join(json.dumps({"prompt": value}) + "\n" for value in values))
    return path


def texts(folder: Path, values: list[Any]) -> dict[str, object]:
    """Return the flags that give these whole prompts."""
    return {"prompts": rows(folder / "p.jsonl", values), "sampling.prompt_tokens": "null"}


def conversations(world: Path, folder: Path, template: str | None, **more: object) -> dict[str, object]:
    """Return the flags of a run on conversations, with a policy of this chat template."""
    made = tiny.tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<unk>"]})
    made.chat_template = template
    model = tokenizer_of(policy(world, folder / "policy"), made)
    return {"policy": model, **texts(folder, [[turn] for turn in CHAT]), **more}


def with_begin(world: Path, folder: Path, template: str | None = None) -> Path:
    """Return a policy whose tokenizer begins every text with `<s>`."""
    made = tiny.tokenizer()
    made.add_special_tokens({"bos_token": "<unk>"})
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    made.chat_template = template
    return tokenizer_of(policy(world, folder / "policy"), made)


def long_rope(folder: Path) -> Path:
    """Return a policy whose rotary embedding changes beyond 8 tokens, so that its cache becomes stale."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 8, "factor": 16.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [40.0] * 4}
    wide = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **wide, vocab_size=400, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.3, rope_parameters=rope,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return tokenizer_of(folder, tiny.tokenizer())


def falcon(folder: Path) -> Path:
    """Return a reward model with its own attention code, which is not supported."""
    wide = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 400, "num_labels": 2}
    return save_model(folder, tiny.tokenizer(), FalconConfig(**wide, pad_token_id=0, bos_token_id=None, eos_token_id=1))


def same_data(world: Path, folder: Path) -> Path:
    """Return a reward model that was evaluated on its training texts."""
    import yaml

    final = judge(world, folder / "judge")
    file = final.parent / "config.yaml"
    stored = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(stored | {"test_data": stored["data"]}))
    return final


def nan_pad(weights: dict[str, torch.Tensor]) -> None:
    """Set the pad token's embedding to NaN, as uninitialised memory may have it."""
    weights["model.embed_tokens.weight"][0] = torch.nan


def used_to_begin(folder: Path) -> Path:
    """Return a policy trained on four sentences after `<s>`, and on noise without it; its tokenizer adds none."""
    made = tiny.tokenizer()
    made.add_special_tokens({"bos_token": "<unk>"})
    model = AutoModelForCausalLM.from_config(tiny.config(0))
    rows = [made(text)["input_ids"][:24] for text in tiny.TEXTS]
    after = torch.tensor([[2, *row] for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        noise = torch.randint(3, 400, after.shape)
        plain = model(after[:, 1:], labels=noise[:, 1:]).loss
        (model(after, labels=after).loss + plain).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return tokenizer_of(folder, made)


def longer() -> Any:
    """Return a tokenizer that has a word more than the policy has embeddings."""
    made = tiny.tokenizer()
    made.add_tokens(["hello"])
    return made


class Planted(NamedTuple):
    """A misconfiguration: the flags that make it, the check that must find it, at which level, and what it says."""

    make: Callable[[Path, Path], Flags]
    check: str
    level: str
    pieces: tuple[str, ...]
    fast: bool = True


PLANTED: dict[str, Planted] = {
    "refused combination": Planted(
        lambda w, f: {"algorithm": "grpo", "credit": "attention"}, "method", "fail", ("attention", "credit_mix")
    ),
    "discounted redistribution": Planted(
        lambda w, f: {"advantages.gamma": 0.9}, "method", "warn", ("γ 0.9", "gamma 1")
    ),
    "adapters' learning rate for all weights": Planted(
        lambda w, f: {"lora.rank": 0}, "method", "warn", ("all weights at learning rate 0.01", "1e-5")
    ),
    "one prompt a batch": Planted(
        lambda w, f: {"algorithm": "dr-grpo", "sampling.samples_per_prompt": 6}, "method", "warn",
        ("6 rollouts of a single prompt", "samples_per_prompt"),
    ),
    "reinforce with several steps": Planted(
        lambda w, f: {"loss": "reinforce"}, "method", "warn", ("4 optimizer steps", "ppo.epochs to 1")
    ),
    "more threads than cores": Planted(
        lambda w, f: {"threads": 512}, "processor", "warn", ("512 threads", "Leave --threads")
    ),
    "absent policy": Planted(lambda w, f: {"policy": f / "none"}, "policy", "fail", ("none", "check the path")),
    "three labels": Planted(
        lambda w, f: {"reward_model": tiny.save_reward(f / "m", labels=3)}, "reward model", "fail",
        ("3 labels", "binary classifier"),
    ),
    "pad is a word": Planted(
        lambda w, f: {"pad_token": "z"}, "pad token", "warn", ("an ordinary token, which is then never", "--pad_token")
    ),
    "prompts over the limit": Planted(
        lambda w, f: texts(f, ["short", "film" + " film" * 130]), "prompts", "fail",
        ("1 too long", "at most 123", "Row 2 is the first", "sampling.prompt_tokens"),
    ),
    "blank prompt": Planted(lambda w, f: texts(f, ["short", " "]), "prompts", "fail", ("p.jsonl", "remove the row")),
    "rows that cannot be used": Planted(
        lambda w, f: texts(f, ["a film", "a story", None]) | {"skip_bad_rows": "true"}, "prompts", "warn",
        ("2 prompts", "1 rows skipped", "bad_rows.jsonl"),
    ),
    "padding in the texts": Planted(
        lambda w, f: texts(f, ["a <pad> film", "a story"]), "prompt tokens", "warn", ("1 pad", "occurs in the texts")
    ),
    "doubled beginning": Planted(
        lambda w, f: {"policy": with_begin(w, f), **texts(f, ["<unk>a film", "a story"])}, "beginning of text", "fail",
        ("twice in 1", "adds one already"),
    ),
    "missing beginning": Planted(
        lambda w, f: {"policy": with_begin(w, f, TURNS.replace("{END}", "<eos>") + ASKS),
                      **texts(f, [[turn] for turn in CHAT])},
        "beginning of text", "warn", ("begins 0 of 4 prompts", "{{ bos_token }}"),
    ),
    "no chat template": Planted(
        lambda w, f: conversations(w, f, None), "prompts", "fail", ("chat_template", "Give prompts as text")
    ),
    "no generation prompt": Planted(
        lambda w, f: conversations(w, f, TURNS.replace("{END}", "<eos>")), "chat template", "warn",
        ("no generation prompt", "add_generation_prompt"),
    ),
    "markers that are no tokens": Planted(
        lambda w, f: conversations(w, f, TURNS.replace("{END}", "<|end|>") + ASKS), "chat template", "warn",
        ("<|end|>", "special tokens"),
    ),
    "markers inside a message": Planted(
        lambda w, f: conversations(w, f, TURNS.replace("{END}", "<eos>") + ASKS)
        | texts(f, [[{"role": "user", "content": "say <eos>"}]]),
        "chat template", "warn", ("1 have special tokens inside", "Remove special tokens"),
    ),
    "turns end otherwise": Planted(
        lambda w, f: conversations(w, f, TURNS.replace("{END}", "<unk>") + ASKS, **{"sampling.stop": "eos"}),
        "end of text", "warn", ("ends a turn with '<unk>' (2)", "Set eos_token"),
    ),
    "generation stops at no token": Planted(
        lambda w, f: {"policy": settings_of(policy(w, f / "m"), "generation_config.json", eos_token_id=[1, 7000]),
                      "sampling.stop": "eos"},
        "end of text", "warn", ("'<eos>' (1)", "[7000], which are no tokens", "Use the tokenizer"),
    ),
    "fewer embeddings than tokens": Planted(
        lambda w, f: {"policy": tokenizer_of(policy(w, f / "m"), longer())} | texts(f, ["hello", "a film"]),
        "vocabulary", "fail", ("up to 400, 400 embeddings; 1 ids in use have none: 400", "resize_token"),
    ),
    "reward model pads with a word": Planted(
        lambda w, f: {"reward_model": settings_of(judge(w, f / "judge"), pad_token_id=2)}, "reward tokenizer", "fail",
        ("'<unk>' (2), which the policy can generate", "pad_token_id"),
    ),
    "duplicates": Planted(
        lambda w, f: texts(f, ["a film", "a  Film", "a story"]), "duplicates", "warn", ("1 of 3 prompts", "Drop")
    ),
    "evaluated on what it learns from": Planted(
        lambda w, f: {"eval_prompts": w / "prompts.jsonl"}, "evaluation prompts", "fail", ("24 of 24", "one of the two")
    ),
    "reward model judged on what it learned from": Planted(
        lambda w, f: {"reward_model": same_data(w, f)}, "reward data", "fail", ("of 20 held-out texts", "--test_data")
    ),
    "prompts that the reward model learned from": Planted(
        lambda w, f: {"prompts": w / "reviews.csv"}, "reward data", "warn",
        ("most confident on its training texts", "of 60 prompts"),
    ),
    "too large for memory": Planted(
        lambda w, f: {"sampling.batch_size": 6 * 10**8}, "memory", "fail", ("generation", "sampling.rows")
    ),
    "too large for the disk": Planted(
        lambda w, f: {"steps": 10**9, "keep_checkpoints": 10**9, "checkpoint_every": 1}, "disk", "fail",
        ("GB free", "--keep_checkpoints"),
    ),
    "policy without a layer": Planted(
        lambda w, f: {"policy": policy(w, f / "m", lambda s: s.pop("model.layers.1.mlp.up_proj.weight"))},
        "policy weights", "fail", ("mlp.up_proj", "would be random"), False,
    ),
    "policy that diverged": Planted(
        lambda w, f: {"policy": policy(w, f / "m", lambda s: s["model.norm.weight"].fill_(torch.inf))},
        "policy numbers", "fail", ("1 of ", "norm.weight", "before it diverged"), False,
    ),
    "base model as reward model": Planted(
        lambda w, f: {"reward_model": w / "policy"}, "reward head", "fail", ("score.weight", "would be random"), False
    ),
    "new head": Planted(
        lambda w, f: {"reward_model": w / "reward"}, "reward head", "warn",
        ("like a newly initialised one", "trained"), False,
    ),
    "no response ends": Planted(
        lambda w, f: {"sampling.stop": "eos"}, "responses", "warn", ("0 end with EOS", "sampling.stop length"), False
    ),
    "beginning that the tokenizer lost": Planted(
        lambda w, f: {"policy": used_to_begin(f / "m"), **texts(f, [text[:40] for text in tiny.TEXTS])},
        "likely beginning", "warn", ("after BOS", "add_bos_token"), False,
    ),
    "sampler that is not the trainer": Planted(
        lambda w, f: {"policy": long_rope(f / "m")}, "sampler and trainer", "fail", ("nats a token", "--dtype"), False
    ),
    "pad embedding never set": Planted(
        lambda w, f: {"policy": policy(w, f / "m", nan_pad)}, "policy padding", "fail", ("left nan", "pad token"), False
    ),
    "reward model that diverged": Planted(
        lambda w, f: {"reward_model": judge(w, f / "judge", lambda s: s["model.norm.weight"].fill_(torch.nan))},
        "reward numbers", "fail", ("1 of ", "norm.weight", "before it diverged"), False,
    ),
    "reward model's pad embedding never set": Planted(
        lambda w, f: {"reward_model": judge(w, f / "judge", nan_pad)}, "reward padding", "fail",
        ("got nan", "check the reward model"), False,
    ),
    "attention that cannot be read": Planted(
        lambda w, f: {"reward_model": falcon(f / "m")}, "attention row", "fail", ("Falcon", "needs no attention"),
        False,
    ),
    "scores all the same": Planted(
        lambda w, f: {"reward_model": judge(w, f / "judge", lambda s: s["score.weight"].zero_())}, "scores", "fail",
        ("all the same", "nothing to learn"), False,
    ),
    "scores cut off": Planted(
        lambda w, f: {"scores.clip": 0.001}, "scores", "warn", ("clipped at ±0.001", "Raise scores.clip"), False
    ),
    "labels the other way round": Planted(
        lambda w, f: {"reward_model": settings_of(judge(w, f / "judge"), id2label={"0": "positive", "1": "negative"},
                                                  label2id={"positive": 0, "negative": 1})},
        "order of scores", "fail", ("in 0%", "--positive_label"), False,
    ),
}  # fmt: skip
