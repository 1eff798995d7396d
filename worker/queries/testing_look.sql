-- Purpose: is anything left to do at this moment? For the testing kit's worker, all in one snapshot:
--   busy      tasks that are ready, claimed, suspect, or due
--   strangers the names of those that no live worker knows: nobody will ever take them
--   queues    where the others are
--   next_in   in how many seconds the first of those that wait for a time is due
--   workers   how many live
-- Index: none: all tasks of a test's database are read.
-- Locks: none.
with task as (
    select t.*, t.queue <> 'stepwell' and t.state <> 'claimed' and not exists (
                    select from stepwell.workers w where w.dead_at is null and t.name = any (w.names)) as stranger,
           t.state in ('ready', 'claimed', 'suspect', 'shelved')
               or (t.state = 'waiting' and t.due_at <= clock_timestamp()) as busy
    from stepwell.tasks t)
select count(*) filter (where task.busy and not task.stranger),
       array_remove(array_agg(distinct task.name) filter (where task.busy and task.stranger), null),
       array_remove(array_agg(distinct task.queue) filter (where task.busy and task.queue <> 'stepwell'), null),
       extract(epoch from min(task.due_at) filter (where task.state = 'waiting' and not task.busy) - clock_timestamp())
           ::float8,
       (select count(*) from stepwell.workers w where w.dead_at is null)
from task;
