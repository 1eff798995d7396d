-- Purpose: the runs that a run has called and has not given up on, in the order of their calls.
-- Index: runs_children (parent_id, parent_path); tasks_identity for their status. Locks: none.
select r.id, s.workflow, s.status, r.parent_path, r.created_at
  from stepwell.runs r
  join stepwell.run_status s on s.id = r.id
 where r.parent_id = %(run)s::uuid and r.parent_path is not null
 order by r.parent_path;
