-- Purpose: what a run shows of itself, all of it or one key; one row without a key if that is nothing, none for an
--   unknown run.
-- Index: primary key of runs; primary key of state (run_id, key). Locks: none.
select s.key, s.value::text
from stepwell.runs r
left join stepwell.state s on s.run_id = r.id and (%(key)s::text is null or s.key = %(key)s::text)
where r.id = %(run)s::uuid
order by s.key;
