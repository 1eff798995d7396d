-- Purpose: open a failed, cancelled or blocked run again. One row (new epoch or null, the state before), none
--   for an unknown run.
-- Index: primary key of runs. Locks: the run's row, which no claimant holds while the run has no task.
select stepwell.retry(r.id), r.state
from stepwell.runs r
where r.id = %(run)s::uuid;
