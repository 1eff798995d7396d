-- Purpose: what says why a run is not running: its task, the failures at its call, the tasks before it in its
--   queue (counted up to 10,001), what it waits for (its calls that are tasks of their own, grouped by what they have in
--   common; its children; what was sent to it), the workers, all in one snapshot.
-- Index: primary key of runs; tasks_identity; tasks_ready for the count and the wakes; primary key of outbox;
--   runs_children; signals_of_run.
-- Locks: none.
-- A worker's supervisor holds an advisory lock on the worker's id, unless a pooler sits between.
select r.state, r.error::text, clock_timestamp(),
       t.state, t.queue, r.workflow, t.due_at, t.doing, t.attempt, t.interruptions, t.pending, t.cancelling,
       t.claimed_by,
       exists (select from stepwell.tasks k
               where k.state = 'ready' and k.queue = 'stepwell' and k.run_id = r.id and k.name = 'cancel'),
       tried.name, tried.failures, tried.last_error::text,
       case when t.state = 'ready' then (
           select count(*)
           from (select from stepwell.tasks a
                 where a.state = 'ready' and a.queue = t.queue
                   and (a.priority, a.fresh, a.turn) < (t.priority, t.fresh, t.turn)
                 limit 10001) ahead) end,
       (select json_agg(json_build_object(
                   'id', w.id, 'host', w.host, 'pid', w.pid, 'beat', w.beat, 'dead', w.dead_at is not null,
                   'serves', coalesce(t.queue = any (w.queues), false), 'knows', coalesce(t.name = any (w.names), false),
                   'locked', w.id in (select s.worker from stepwell.supervised s)))::text
        from stepwell.workers w),
       r.version, t.awaits,
       (select json_agg(json_build_object(
                   'kind', g.kind, 'name', g.name, 'queue', g.queue, 'state', g.state, 'tried', g.tried,
                   'count', g.count, 'counted', g.counted, 'path', g.path, 'due_at', g.due_at, 'owners', g.owners,
                   'serving', array(select w.id from stepwell.workers w where g.queue = any (w.queues)),
                   'knowing', array(select w.id from stepwell.workers w
                                    where g.queue = any (w.queues) and g.name = any (w.names))) order by g.path)::text
        from (select k.kind, k.name, k.queue, k.state, k.attempt > 0 as tried, count(*) as count,
                     count(*) filter (where k.wakes in (1, 2)) as counted, min(k.path) as path, min(k.due_at) as due_at,
                     coalesce(array_agg(distinct k.claimed_by) filter (where k.claimed_by is not null), '{}') as owners
              from stepwell.tasks k
              where k.run_id = r.id and k.kind not in ('wake', 'deliver') and k.kind in ('step', 'timer')
                and k.wakes <> 0
              group by k.kind, k.name, k.queue, k.state, k.attempt > 0) g),
       (select json_build_object('open', count(*) filter (where c.state = 'open'),
                                 'blocked', count(*) filter (where c.state = 'blocked'),
                                 'first', min(c.id::text) filter (where c.state = 'open'),
                                 'first_blocked', min(c.id::text) filter (where c.state = 'blocked'))::text
        from stepwell.runs c
        where c.parent_id = r.id and c.parent_path is not null and c.state in ('open', 'blocked')),
       (select array_agg(distinct n.name)
        from stepwell.signals n
        where n.run_id = r.id and not starts_with(n.name, 'stepwell:'))
from stepwell.runs r
left join stepwell.tasks t on t.run_id = r.id and t.kind = 'run' and t.path = '{}'
left join lateral (
    select max(o.name) as name, count(*) filter (where o.outcome = 'failed') as failures,
           (array_agg(o.error order by o.seq desc) filter (where o.outcome = 'failed'))[1] as last_error
    from stepwell.outbox o
    where o.run_id = r.id and o.path = t.doing and o.n > 0 and o.kind = 'step'
      and not exists (select from stepwell.outbox f
                      where f.run_id = o.run_id and f.epoch = o.epoch and f.path = o.path and f.n = 0)) tried on true
where r.id = %(run)s::uuid;
