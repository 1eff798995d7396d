-- What was sent to some runs and is not taken yet, in the order in which it came.
-- Index: signals_of_run.
-- Locks: none.
select s.run_id, s.id, s.name, s.payload::text
from stepwell.signals s
where s.run_id = any(%s)
order by s.run_id, s.id
