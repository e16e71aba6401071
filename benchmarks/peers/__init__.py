"""Runs of other packages' released trainers, each in a process and an environment of its own."""
