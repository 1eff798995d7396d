-- How many runs there are, how many have ended, and how many will not end by themselves.
-- Index: none; every run of the demo is counted.
-- Locks: none.
select count(*)                                                               as total,
       count(*) filter (where state in ('succeeded', 'failed', 'cancelled')) as ended,
       count(*) filter (where state = 'blocked')                             as blocked
from stepwell.runs
