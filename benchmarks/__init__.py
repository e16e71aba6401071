"""Benchmarks of a checkout: `python -m benchmarks.NAME` from its root; none is part of the installed package."""
