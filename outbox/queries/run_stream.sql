-- Purpose: what a run has emitted after a position, and the state that the run had by then, in one snapshot. Items of
--   other names come without a value: they tell how far this look got. No row for an unknown run.
-- Index: primary key of runs; primary key of stream (run_id, epoch, n), a range of it. Locks: none.
select r.state, s.epoch, s.n, s.name, s.value, s.at
from stepwell.runs r
left join lateral (
    select e.epoch, e.n, e.name, e.at,
           case when %(name)s::text is null or e.name = %(name)s::text then e.value::text end as value
    from stepwell.stream e
    where e.run_id = r.id and (e.epoch, e.n) > (%(epoch)s::int, %(n)s::int)
    order by e.epoch, e.n
    limit %(limit)s::int) s on true
where r.id = %(run)s::uuid
order by s.epoch, s.n;
