"""Evaluation of a policy against its start."""
