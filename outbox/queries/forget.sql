-- Purpose: erase what came in under a key, and what was made of it; the ids of the runs.
-- Index: keys; runs_children, runs_orphans, outbox_forks, primary keys, inside the function.
-- Locks: the rows of these runs, which have ended, in the order of their ids.
select stepwell.forget(%(key)s::text, %(workflow)s::text)::text[];
