-- How many tasks these workers still hold.
-- Index: tasks_claimed.
-- Locks: none.
select count(*)
from stepwell.tasks
where state = 'claimed' and claimed_by = any(%s)
