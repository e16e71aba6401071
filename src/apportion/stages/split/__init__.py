"""People's rankings split by prompt into what is trained on and what is held out."""
