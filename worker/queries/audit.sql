-- What the database says that this worker holds, with the fence of each claim, and what of it is to be cancelled.
-- Index: tasks_claimed.
-- Locks: none.
select t.id, t.attempt, t.position, t.run_id, t.cancelling
from stepwell.tasks t
where t.state = 'claimed' and t.claimed_by = %s
