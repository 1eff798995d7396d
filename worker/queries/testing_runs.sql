-- Purpose: the runs of a test's database in the order of their enqueueing, with their keys.
-- Index: none; all of the test's runs are read.
-- Locks: none.
select s.id, s.workflow, k.key, s.queue, s.status, r.input::text, r.error::text
from stepwell.run_status s
join stepwell.runs r on r.id = s.id
left join stepwell.keys k on k.run_id = s.id and k.workflow = s.workflow
order by s.created_at, s.id;
