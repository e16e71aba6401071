"""Services that a run may give to when asked: trackers of its metrics, a hub for its final model and card."""
