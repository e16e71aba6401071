"""LoRA against training of all weights: accuracy, trained bytes and peak memory."""
