-- Purpose: become the one session that exports the database's metrics, for as long as the session lives.
-- Two int keys, apart from the bigint ones by which supervisors hold a lock for each worker. If another session holds it,
-- answers whose it is, should it be nobody's who may be an exporter: the same are meant as in the view supervised.
-- Index: none. Locks: one session advisory lock, without waiting.
with mine as materialized (
    select pg_catalog.pg_try_advisory_lock(pg_catalog.hashtext('stepwell'), pg_catalog.hashtext('exporter')) as it)
select m.it, s.pid, s.usename
  from mine m
  left join lateral (
       select a.pid, a.usename
         from pg_catalog.pg_locks l
         join pg_catalog.pg_stat_activity a on a.pid = l.pid
        where not m.it and l.locktype = 'advisory' and l.objsubid = 2 and l.granted
          and l.classid::int8 = pg_catalog.hashtext('stepwell') & 4294967295
          and l.objid::int8 = pg_catalog.hashtext('exporter') & 4294967295
          and l.database = (select d.oid from pg_catalog.pg_database d
                             where d.datname = pg_catalog.current_database())
          and not coalesce(
                  pg_catalog.has_table_privilege(a.usesysid, 'stepwell.workers', 'update')
                  or pg_catalog.pg_has_role(a.usesysid, (select n.nspowner from pg_catalog.pg_namespace n
                                                          where n.nspname = 'stepwell'), 'member')
                  or pg_catalog.pg_has_role(a.usesysid, pg_catalog.to_regrole('stepwell_worker'), 'member'), false)
        limit 1) s on true;
