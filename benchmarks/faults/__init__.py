"""`apportion bench faults` and `soak`: real runs that are killed and go on, and a long one that may not grow."""
