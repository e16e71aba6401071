"""Sampling of responses: the Sampler protocol and the sampler for transformers models."""

from apportion.generation.sampler import Sampler, sample

__all__ = ["Sampler", "sample"]
