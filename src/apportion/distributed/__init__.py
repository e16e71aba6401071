"""Several processes: collectives, error relay, launcher checks, sharded weights."""
