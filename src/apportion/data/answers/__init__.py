"""Rows with answers to train on: demonstrations, preference pairs, and pairs of rankings."""

from apportion.data.answers.demonstrations import Demonstration, DemonstrationReader, builtin_demonstrations
from apportion.data.answers.pairs import Pair, PairReader
from apportion.data.answers.rankings_to_pairs import pairs_of_rankings

__all__ = [
    "Demonstration",
    "DemonstrationReader",
    "Pair",
    "PairReader",
    "builtin_demonstrations",
    "pairs_of_rankings",
]
