-- Purpose: the backends that still serve a worker, found by the name that all of its connections carry, and whether
-- each is in the middle of a statement (unknown to a role without the right: false).
-- Index: none, a function scan over the process array. Locks: none.
select pid, coalesce(state = 'active', false)
  from pg_catalog.pg_stat_activity
 where application_name = %s and datname = pg_catalog.current_database() and pid <> pg_catalog.pg_backend_pid();
