"""Policies, reward models and what is read out of them."""

from apportion.models.attention.row import AttentionTap, attention_row

__all__ = ["AttentionTap", "attention_row"]
