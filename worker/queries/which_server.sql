-- Purpose: which server answers, and since when it runs: behind a pooler a connection outlives a restart and a failover.
-- Index: none. Locks: none.
select pg_catalog.pg_postmaster_start_time(), pg_catalog.inet_server_addr(), pg_catalog.inet_server_port();
