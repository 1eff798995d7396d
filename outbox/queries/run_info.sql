-- Purpose: everything about one run except its history.
-- Index: primary keys of runs and state; tasks_identity (run_id, path). Locks: none.
select s.id::text, s.workflow, s.status, s.queue, s.priority, s.labels::text, s.epoch, s.created_at, s.started_at,
       s.finished_at, s.deadline_at, r.input::text, r.output::text, r.error::text, s.attempt, s.doing, s.due_at,
       s.task_state, s.claimed_by, s.interruptions, s.version, s.parent_id::text,
       (select p.value::text from stepwell.state p where p.run_id = s.id and p.key = 'progress'), r.key,
       r.trace
from stepwell.run_status s
join stepwell.runs r on r.id = s.id
where s.id = %(run)s::uuid;
