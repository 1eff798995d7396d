-- Purpose: declare a worker dead, counted under what noticed it; false when the database does not know it (any more).
-- Index: workers' primary key.
-- Locks: the worker's row (for update, waits 0.5 s, then 55P03), then one row of counters.
select stepwell.bury_v1(%s, %s);
