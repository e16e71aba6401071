"""Statistics of a comparison of policies on the same prompts: bootstrap, win rates, length control, diversity."""
