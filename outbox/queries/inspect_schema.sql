-- Purpose: what there is of Stepwell in this database, from catalogs that every role may read:
-- whether the schema exists, whether its table of migrations does, whether this role may read that
-- table, and the names of the schema's functions.
-- Index: pg_namespace_nspname_index, pg_class_relname_nsp_index. Locks: none.
select n.oid is not null as has_schema,
       c.oid is not null as has_migrations,
       coalesce(has_schema_privilege(n.oid, 'USAGE') and has_table_privilege(c.oid, 'SELECT'), false) as may_read,
       array(select p.proname::text from pg_catalog.pg_proc p where p.pronamespace = n.oid) as functions
  from (values ('stepwell')) as wanted (name)
  left join pg_catalog.pg_namespace n on n.nspname = wanted.name
  left join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = 'migrations' and c.relkind = 'r'
