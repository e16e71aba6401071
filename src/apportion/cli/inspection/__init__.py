"""Commands that inspect: the credit of a text, a reward model and a policy before training, a run before it starts."""
