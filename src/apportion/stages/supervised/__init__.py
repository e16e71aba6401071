"""Parts that `sft` and `dpo` share: rows as ids, the model to train, held-out log-probabilities."""
