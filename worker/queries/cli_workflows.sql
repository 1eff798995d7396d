-- Purpose: what the workers have published last of each workflow: its queue, and what it takes.
-- Index: none; the table has one row for each workflow and version.
-- Locks: none.
select distinct on (name) name, queue, input_schema::text
  from stepwell.workflows
 order by name, seen_at desc;
