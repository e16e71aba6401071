"""Attention weights of chosen rows, read during the ordinary forward pass."""
