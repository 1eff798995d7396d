-- Purpose: record one migration as applied, in the transaction that applied it.
-- Index: migrations_pkey. Locks: the new row.
insert into stepwell.migrations (version, name) values (%(version)s, %(name)s)
