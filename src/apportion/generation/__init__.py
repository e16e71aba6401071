"""Sampling of responses from transformers models."""

from apportion.generation.sampler import sample

__all__ = ["sample"]
