-- Purpose: how many clients besides this one are connected to the server, in whatever database.
-- Index: none, a function scan over the process array. Locks: none.
select count(*)
  from pg_catalog.pg_stat_activity
 where backend_type = 'client backend'
   and pid <> pg_catalog.pg_backend_pid();
