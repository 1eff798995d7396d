-- Purpose: open failed, cancelled and blocked runs again; the ids of those that were.
-- Index: primary keys of runs and outbox. Locks: the rows of these runs, in the order of their ids.
select array_agg(u.id::text)
from (select i from unnest(%(runs)s::uuid[]) i order by i) u (id)
where stepwell.retry(u.id) is not null;
