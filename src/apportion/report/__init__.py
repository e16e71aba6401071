"""Run folders into one self-contained HTML page, and the token heat maps that the command line shares with it."""
