"""One process per peer, each under its own interpreter: nothing of ours is imported here."""
