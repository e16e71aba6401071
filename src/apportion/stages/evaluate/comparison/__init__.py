"""Comparison of policies on the same prompts: `compare.py` is the order of the work."""
