"""Commands that connect the stages: split and run."""
