-- Purpose: become the one session that exports the database's metrics, for as long as the session lives.
-- Two int keys, apart from the bigint ones by which supervisors hold a lock for each worker.
-- Index: none. Locks: one session advisory lock, without waiting.
select pg_catalog.pg_try_advisory_lock(pg_catalog.hashtext('stepwell'), pg_catalog.hashtext('exporter'));
