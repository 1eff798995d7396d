-- What was sent to some runs and is not taken yet, in the order in which it came. A payload that is too large is not read:
-- anybody who may signal may write any. The results of children are our own, and no larger than results may be.
-- Index: signals_of_run.
-- Locks: none.
select s.run_id, s.id, s.name, case when g.fits then s.payload::text end,
       case when not g.fits then stepwell.size_of(s.payload) end, s.trace
from stepwell.signals s
cross join lateral (
    select starts_with(s.name, 'stepwell:') or stepwell.fits(s.payload, %(max_bytes)s::bigint) as fits) g
where s.run_id = any(%(runs)s)
order by s.run_id, s.id
