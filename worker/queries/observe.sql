-- Purpose: what an observer sees of every worker: its beat, whether it was buried already, and whether its
-- supervisor holds its advisory lock. A bigint key is shown as classid (high half) and objid (low half), objsubid 1.
-- Index: none, a row for each worker process; pg_locks is read once.
-- Locks: none.
with held as materialized (
    select (l.classid::bigint << 32) | l.objid::bigint as id
      from pg_catalog.pg_locks l
     where l.locktype = 'advisory' and l.objsubid = 1 and l.granted
       and l.database = (select d.oid from pg_catalog.pg_database d
                          where d.datname = pg_catalog.current_database()))
select w.id, w.beat, w.dead_at is not null, w.id in (select h.id from held h), w.host, w.pid
  from stepwell.workers w
 order by w.id;
