-- Purpose: test databases of this role whose session is gone: it has no connection under its name any more.
-- Index: none; a catalogue of a few rows.
-- Locks: none.
select d.datname
from pg_catalog.pg_database d
join pg_catalog.pg_roles r on r.oid = d.datdba and r.rolname = current_user
where d.datname ~ '^stepwell_test_[0-9]+_[0-9a-f]{8}_[0-9]+$'
  and not exists (
      select from pg_catalog.pg_stat_activity a
      where a.application_name
            = 'stepwell testing ' || split_part(d.datname, '_', 3) || '_' || split_part(d.datname, '_', 4))
order by d.datname;
