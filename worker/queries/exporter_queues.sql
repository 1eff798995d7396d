-- Purpose: how many tasks each queue holds, by state; queues that only workers know appear with state null.
-- Index: none, it reads the whole task table: the exporter spaces it by what it took.
-- Locks: none.
select queue, state, count(*)
  from stepwell.tasks
 group by queue, state
union all
select distinct served, null, 0
  from stepwell.workers, unnest(queues) as served
 where dead_at is null;
