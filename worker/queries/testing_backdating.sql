-- Purpose: the statements that move every time that Stepwell has stored into the past, one for each table: found in the
--   catalogue, so that none is forgotten.
-- Index: none; the catalogue.
-- Locks: none; what they lock is every row.
select format('update %s set %s', c.oid::regclass,
              string_agg(format('%1$I = %1$I - make_interval(secs => %%(seconds)s)', a.attname), ', ' order by a.attnum))
from pg_catalog.pg_class c
join pg_catalog.pg_attribute a on a.attrelid = c.oid
where c.relnamespace = 'stepwell'::regnamespace and c.relkind in ('r', 'p') and not c.relispartition
  and c.relname <> 'migrations'
  and a.attnum > 0 and not a.attisdropped and a.attgenerated = '' and a.atttypid = 'timestamptz'::regtype
group by c.oid
order by c.relname;
