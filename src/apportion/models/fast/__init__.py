"""Faster kernels with equal results."""
