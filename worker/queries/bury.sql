-- Purpose: declare a worker dead; false when the database does not know it (any more).
-- Index: workers' primary key.
-- Locks: the worker's row (for update, waits 0.5 s, then 55P03).
select stepwell.bury_v1(%s);
