-- Purpose: for how many seconds the longest ready task of each of %(queues)s has been ready. Tasks do not
-- record when they became ready; turn orders them by it, so it is asked of the head of each group only:
-- when the task was due, or else when its run was enqueued or (resumed work) last wrote history.
-- Index: tasks_ready, 20 probes for each queue; runs_pkey and outbox_pkey for each head.
-- Locks: none.
select q.queue, max(extract(epoch from clock_timestamp() - since.at))::float8
  from unnest(%(queues)s::text[]) as q (queue)
 cross join generate_series(0, 9) as p (priority)
 cross join (values (false), (true)) as f (fresh)
 cross join lateral (
       select t.run_id, t.due_at, t.started_at
         from stepwell.tasks t
        where t.state = 'ready' and t.queue = q.queue and t.priority = p.priority and t.fresh = f.fresh
        order by t.turn
        limit 1) as head
  join stepwell.runs r on r.id = head.run_id
 cross join lateral (
       select case when head.due_at is not null then greatest(head.due_at, r.created_at)
                   when f.fresh then r.created_at
                   else coalesce((select max(o.at) from stepwell.outbox o where o.run_id = r.id),
                                 head.started_at, r.created_at) end) as since (at)
 group by q.queue;
