-- Purpose: the backends that still serve a worker, and whether each is in the middle of a statement (unknown to a role
-- without the right: false). They are found by the name that all of its connections carry, unless they go through a pooler;
-- and by the lock that each of its transactions which locks anything holds, whatever a step or a pooler has made of the
-- name: the worker's id, negated. A bigint key is shown as classid (high half) and objid (low half), objsubid 1.
-- Index: none, function scans over the process array and the locks. Locks: none.
with marked as materialized (
    select l.pid
      from pg_catalog.pg_locks l
     where l.locktype = 'advisory' and l.objsubid = 1 and l.granted
       and (l.classid::bigint << 32) | l.objid::bigint = -(%(worker)s::bigint)
       and l.database = (select d.oid from pg_catalog.pg_database d
                          where d.datname = pg_catalog.current_database()))
select a.pid, coalesce(a.state = 'active', false)
  from pg_catalog.pg_stat_activity a
 where (a.application_name = 'stepwell ' || %(worker)s::text or a.pid in (select m.pid from marked m))
   and a.datname = pg_catalog.current_database() and a.pid <> pg_catalog.pg_backend_pid();
