-- Purpose: make a run with what happened in another one before a call; its id, null if there is no such run.
-- Index: primary keys of runs and outbox. Locks: none.
select stepwell.fork(%(run)s::uuid, %(path)s::int[], %(input)s::json, %(version)s::text)::text;
