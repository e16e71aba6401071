"""Tokens and text: chat templates, token spans, and the transfer of weights between tokenizers."""
