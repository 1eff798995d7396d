"""One execution of a step: in the loop, in a thread, in a transaction."""
