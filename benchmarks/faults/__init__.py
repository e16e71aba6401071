"""Fault injection on real runs: kills, resumes, and a comparison with undisturbed runs."""
