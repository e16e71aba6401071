"""What the benchmarks share: work, processes, recordings, figures."""
