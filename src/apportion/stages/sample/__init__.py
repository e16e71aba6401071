"""K answers a prompt: `sample.py` is the loop."""
