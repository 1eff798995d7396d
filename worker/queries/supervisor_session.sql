-- Purpose: beats need not be durable: observers start anew after a restart, and a beat must not wait for a
-- replica that is away.
-- Index: none. Locks: none.
set synchronous_commit = off;
