-- Purpose: runs that need a person, live workers, and the age of the oldest transaction of this database,
-- which holds back vacuum; vacuum itself does not. A role without pg_read_all_stats sees only its own transactions.
-- Index: outbox_unhappy_ends finds the blocked without an index on runs that each end would have to write.
-- Locks: none.
select (select count(*)
          from stepwell.outbox o
          join stepwell.runs r on r.id = o.run_id and r.epoch = o.epoch
         where o.kind = 'run' and o.outcome = 'blocked' and r.state = 'blocked') as blocked,
       (select count(*) from stepwell.workers where dead_at is null) as workers,
       (select coalesce(max(extract(epoch from clock_timestamp() - xact_start)), 0)::float8
          from pg_catalog.pg_stat_activity
         where datname = current_database() and pid <> pg_backend_pid()
           and backend_type is distinct from 'autovacuum worker') as oldest_transaction;
