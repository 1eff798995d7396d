-- Claim ready tasks of one queue, and wakes.
-- Index: tasks_ready, by group and turn (inside claim_v1).
-- Locks: the worker's own row (key share), then task rows (skip locked).
select * from stepwell.claim_v1(%s, %s, %s, %s, %s, %s, %s, %s)
