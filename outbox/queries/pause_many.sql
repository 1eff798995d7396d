-- Purpose: pause runs; the ids of those that are open, and paused now.
-- Index: tasks_identity. Locks: the tasks of these runs in the order of a flush, then those of their calls.
select stepwell.pause_many(%(runs)s::uuid[])::text[];
