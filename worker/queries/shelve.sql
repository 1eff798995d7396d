-- Set aside what no live worker of the queue knows.
-- Index: tasks_ready, the head of each group.
-- Locks: ready task rows (skip locked).
select stepwell.shelve_v1(%s, %s)
