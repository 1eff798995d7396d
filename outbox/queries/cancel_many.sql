-- Purpose: ask for the end of runs; the ids of those that were open.
-- Index: primary key of runs, inside the function. Locks: none; wake tasks are inserted (I15).
select array_agg(u.id::text)
from unnest(%(runs)s::uuid[]) u (id)
where stepwell.cancel(u.id);
