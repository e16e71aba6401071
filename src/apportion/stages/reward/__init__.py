"""Reward-model training: `train.py` is the loop."""
