"""One process at work: claim, drive, execute, commit."""
