-- Purpose: end one backend, if it still serves a worker, as backends.sql tells; one row if it did. Behind a pooler a backend
-- serves somebody else as soon as the worker's transaction is over. Needs the same role, or pg_signal_backend (42501).
-- Index: none, function scans over the process array and the locks. Locks: none.
with marked as materialized (
    select l.pid
      from pg_catalog.pg_locks l
     where l.locktype = 'advisory' and l.objsubid = 1 and l.granted
       and (l.classid::bigint << 32) | l.objid::bigint = -(%(worker)s::bigint)
       and l.database = (select d.oid from pg_catalog.pg_database d
                          where d.datname = pg_catalog.current_database())
       and l.pid = %(backend)s::int)
select pg_catalog.pg_terminate_backend(a.pid)
  from pg_catalog.pg_stat_activity a
 where a.pid = %(backend)s::int
   and (a.application_name = 'stepwell ' || %(worker)s::text or a.pid in (select m.pid from marked m))
   and a.datname = pg_catalog.current_database() and a.pid <> pg_catalog.pg_backend_pid();
