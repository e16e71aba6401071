"""Several processes: collectives, launchers, sharded weights."""
