"""Measuring ours beside released packages at the same work: `apportion bench` and what benchmarks share."""
