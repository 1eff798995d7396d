-- Seconds from the first claim of a run to the last end of one.
-- Index: none; every run of the demo is looked at.
-- Locks: none.
select extract(epoch from max(finished_at) - min(started_at))::float8
from stepwell.runs
