"""Services of any training loop; they know no algorithm and no stage's settings."""
