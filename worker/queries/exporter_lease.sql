-- Purpose: become, or stay, the one that exports the database's metrics among those who have no session to hold a lock in;
-- one row if so. Whoever has one, and holds the exporter's lock in it, goes before them: the same are meant as in
-- exporter_lock.sql, so that no stranger's lock keeps anybody from exporting.
-- Index: exporter's primary key; a function scan over the locks.
-- Locks: the one row of exporter. Not durable: it must not wait for a replica that is away.
insert into stepwell.exporter as e (holder, until)
select %(holder)s::bigint, clock_timestamp() + make_interval(secs => %(seconds)s::float8)
 where not exists (
       select from pg_catalog.pg_locks l
         join pg_catalog.pg_stat_activity a on a.pid = l.pid
        where l.locktype = 'advisory' and l.objsubid = 2 and l.granted
          and l.classid::int8 = pg_catalog.hashtext('stepwell') & 4294967295
          and l.objid::int8 = pg_catalog.hashtext('exporter') & 4294967295
          and l.database = (select d.oid from pg_catalog.pg_database d
                             where d.datname = pg_catalog.current_database())
          and coalesce(
                  pg_catalog.has_table_privilege(a.usesysid, 'stepwell.workers', 'update')
                  or pg_catalog.pg_has_role(a.usesysid, (select n.nspowner from pg_catalog.pg_namespace n
                                                          where n.nspname = 'stepwell'), 'member')
                  or pg_catalog.pg_has_role(a.usesysid, pg_catalog.to_regrole('stepwell_worker'), 'member'), false))
on conflict (sole) do update set holder = excluded.holder, until = excluded.until
 where e.holder = excluded.holder or e.until < clock_timestamp()
returning pg_catalog.set_config('synchronous_commit', 'off', true);
