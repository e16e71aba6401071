"""Comparison of credit methods before training."""
