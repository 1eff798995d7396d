-- Purpose: whether commits of this session wait until they are durable.
-- Index: none. Locks: none.
select pg_catalog.current_setting('synchronous_commit');
