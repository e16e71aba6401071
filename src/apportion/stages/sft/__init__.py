"""Supervised fine-tuning on demonstrations, on TRL's SFTTrainer: `train.py` is the stage."""
