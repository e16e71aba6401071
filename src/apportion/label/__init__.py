"""A page where people rank the answers of each prompt: its database, its server, its exports and its results."""
