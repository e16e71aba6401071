"""Cross-validation of reward models on people's preferences."""
