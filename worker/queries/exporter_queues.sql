-- Purpose: how many tasks each queue holds, by state; and, with state null, how many live workers serve a queue.
-- Index: none, it reads the whole task table: the exporter spaces it by what it took.
-- Locks: none.
select queue, state, count(*)
  from stepwell.tasks
 group by queue, state
union all
select served, null, count(distinct id)
  from stepwell.workers, unnest(queues) as served
 where dead_at is null
 group by served;
