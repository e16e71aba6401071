"""Recipes: stages in order, each as a process of its own, finished ones skipped."""
