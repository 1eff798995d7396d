-- Purpose: the version of the installed schema; null when no migration is recorded.
-- Index: migrations_pkey. Locks: none.
select max(version) from stepwell.migrations
