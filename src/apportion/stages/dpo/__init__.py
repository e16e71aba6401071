"""Direct preference optimisation on TRL's DPOTrainer: `train.py` is the stage."""
