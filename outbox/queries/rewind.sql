-- Purpose: have a run go on from a call before. One row (new epoch or null, the state before, whether it was paused),
--   none for an unknown run.
-- Index: primary keys of runs and outbox, tasks_identity.
-- Locks: the run's task if it is paused, then its row.
select stepwell.rewind(r.id, %(path)s::int[]), r.state, coalesce(t.paused, false)
from stepwell.runs r
left join stepwell.tasks t on t.run_id = r.id and t.kind = 'run' and t.path = '{}'
where r.id = %(run)s::uuid;
