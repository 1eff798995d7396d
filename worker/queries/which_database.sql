-- Purpose: which database this is, wherever it has failed over to: two that were made apart differ in when the schema was
-- installed.
-- Index: none; a row for each migration. Locks: none.
select (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database()),
       (select min(m.applied_at) from stepwell.migrations m);
