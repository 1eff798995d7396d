-- Purpose: free up to so many tasks of a buried worker; delete it once none is left.
-- Index: tasks_claimed.
-- Locks: its claimed task rows (skip locked), then its doorbell rows and its own row.
select reclaimed, remaining from stepwell.reclaim_v1(%s, %s, %s);
