-- Purpose: the room that each table takes with its indexes, and how many of its rows vacuum has not removed yet.
-- Index: none, a row for each table of the schema.
-- Locks: shared ones on the tables, as any reader.
select c.relname, coalesce(pg_catalog.pg_total_relation_size(c.oid), 0),
       coalesce(pg_catalog.pg_stat_get_dead_tuples(c.oid), 0)
  from pg_catalog.pg_class c
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
 where n.nspname = 'stepwell' and c.relkind = 'r';
