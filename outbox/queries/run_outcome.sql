-- Purpose: whether and how a run has ended. Asked again and again by `result`, so it reads one row.
-- Index: primary key of runs. Locks: none.
select r.state, r.output::text, r.error::text, r.workflow
from stepwell.runs r
where r.id = %(run)s::uuid;
