-- Purpose: have paused runs go on; the ids of those that were paused.
-- Index: tasks_identity. Locks: the tasks of these runs in the order of a flush, then those of their calls.
select stepwell.resume_many(%(runs)s::uuid[])::text[];
