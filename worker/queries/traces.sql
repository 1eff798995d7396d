-- Purpose: in which context some runs were enqueued, where that is known.
-- Index: primary key of runs.
-- Locks: none.
select r.id, r.trace
from stepwell.runs r
where r.id = any(%s) and r.trace is not null
