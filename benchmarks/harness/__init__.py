"""Parts that the benchmarks share: command lines, workloads, measured processes, recordings, figures."""
