"""A trainer of another library (transformers' Trainer, which TRL's are) inside a run folder."""
