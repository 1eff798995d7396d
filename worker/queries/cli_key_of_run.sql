-- Purpose: the key by which a run was enqueued, if it was the first of it.
-- Index: primary key of keys (workflow, key): all keys of the workflow are read, so the caller bounds the time.
-- Locks: none.
select key
  from stepwell.keys
 where workflow = %(workflow)s and run_id = %(run)s::uuid;
