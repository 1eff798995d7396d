-- Purpose: the runs that hold something of what came in under a key, and how they stand.
-- Index: keys, runs_children, runs_orphans, outbox_forks, inside the function; primary key of runs. Locks: none.
select s.id, s.workflow, s.status
  from stepwell.family_of(%(key)s::text, %(workflow)s::text) f
  join stepwell.run_status s on s.id = f
 order by s.id;
