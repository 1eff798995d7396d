-- Purpose: whose session holds the advisory lock of migrations: a bigint key, shown as classid (high half) and objid (low
--   half), objsubid 1.
-- Index: none. Locks: none.
select a.pid, a.usename, a.application_name
  from pg_catalog.pg_locks l
  join pg_catalog.pg_stat_activity a on a.pid = l.pid
 where l.locktype = 'advisory' and l.objsubid = 1 and l.granted
   and (l.classid::bigint << 32) | l.objid::bigint = %(key)s::bigint
   and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database())
 limit 1;
