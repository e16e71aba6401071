"""Policies, reward models, and the attention weights of their forward passes."""

from apportion.models.attention.row import AttentionTap, attention_row

__all__ = ["AttentionTap", "attention_row"]
