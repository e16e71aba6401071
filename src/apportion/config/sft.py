"""Settings of `apportion sft`."""

from __future__ import annotations

from apportion.config.schema.rules import Name, Switch
from apportion.config.trainer import TrainerConfig


class SFTConfig(TrainerConfig):
    """`apportion sft`: fine-tune a model on demonstrations (text, prompt and completion, or messages) with TRL."""

    output: Name = "runs/sft"
    """run folder."""
    text_column: Name | None = None
    """column with the text, the conversation or the completion; null takes text, messages, or completion."""
    completion_only: Switch = True
    """count only what follows the prompt, and turns of the assistant; off, every token."""
    packing: Switch = False
    """put several rows into one of max_length tokens, none of which attends to another: no padding is computed."""
