-- Purpose: what is left to do for one run: its own task, those of its calls, wakes that are under way.
-- Index: tasks_identity (run_id, path); tasks_ready (queue 'stepwell') for the wakes, which have no identity.
-- Locks: none.
select t.id, t.kind, t.path, t.name, t.queue, t.priority, t.state, t.due_at, t.attempt, t.doing, t.interruptions,
       t.cancelling, t.claimed_by, t.awaits
from stepwell.tasks t
where t.run_id = %(run)s::uuid and t.kind not in ('wake', 'deliver')
union all
select t.id, t.kind, t.path, t.name, t.queue, t.priority, t.state, t.due_at, t.attempt, t.doing, t.interruptions,
       t.cancelling, t.claimed_by, t.awaits
from stepwell.tasks t
where t.state = 'ready' and t.queue = 'stepwell' and t.run_id = %(run)s::uuid and t.kind = 'wake'
order by 1;
