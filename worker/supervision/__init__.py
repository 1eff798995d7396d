"""N processes, alive: a supervisor, its children, and how the dead are noticed."""
