-- Whether a task that two workers died of waits to be tried alone here.
-- Index: tasks_set_aside.
-- Locks: none.
select exists (
    select from stepwell.tasks t
    where t.state = 'suspect' and t.queue = any(%s) and t.name = any(%s))
