-- Purpose: hold these workers' advisory locks for as long as this session lives; answers which it got. Does not
-- wait: an earlier session of this supervisor may hold one until the server notices that it is gone.
-- Index: none. Locks: session advisory locks, by worker id.
select w.id
  from unnest(%s::bigint[]) as w (id)
 where pg_catalog.pg_try_advisory_lock(w.id);
