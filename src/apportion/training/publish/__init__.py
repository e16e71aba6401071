"""What a run gives to other services when asked: metrics to trackers, the final model to a hub, with its card."""
