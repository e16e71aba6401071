"""Attention weights of chosen positions, captured during the ordinary forward pass."""
