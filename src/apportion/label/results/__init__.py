"""Figures about rankings: agreement, times and biases, and the page that shows them."""
