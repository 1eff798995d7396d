-- Purpose: what the workers have published of each version of each workflow: its queue, and what it takes. The version
--   that new runs get comes first.
-- Index: none; the table has one row for each workflow and version.
-- Locks: none.
select name, version, queue, input_schema::text
  from stepwell.workflows
 order by name, version = stepwell.current_version(name) desc, seen_at desc;
