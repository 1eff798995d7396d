-- Purpose: open failed, cancelled and blocked runs again; the ids of those that were. Forgotten ones, which are refused one
--   by one, are passed over.
-- Index: primary keys of runs and outbox. Locks: the rows of these runs, in the order of their ids.
with asked as materialized (
    select r.id from stepwell.runs r
    where r.id = any (%(runs)s::uuid[]) and r.forgotten_at is null
    order by r.id)
select array_agg(a.id::text)
from asked a
where stepwell.retry(a.id) is not null;
