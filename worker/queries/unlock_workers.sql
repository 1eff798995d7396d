-- Purpose: give the advisory locks of workers that have exited back.
-- Index: none. Locks: releases session advisory locks.
select pg_catalog.pg_advisory_unlock(w.id)
  from unnest(%s::bigint[]) as w (id);
