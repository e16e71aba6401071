"""Evaluation of a policy against its initial model."""
