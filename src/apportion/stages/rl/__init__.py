"""Reinforcement learning: `train.py` is the loop."""
