-- Purpose: what says why a run is not running: its task, the failures at its call, the tasks before it in its
--   queue (counted up to 10,001), the workers, all in one snapshot.
-- Index: primary key of runs; tasks_identity; tasks_ready for the count and the wakes; primary key of outbox.
-- Locks: none.
-- A worker's supervisor holds an advisory lock on the worker's id, unless a pooler sits between.
select r.state, r.error::text, clock_timestamp(),
       t.state, t.queue, t.name, t.due_at, t.doing, t.attempt, t.interruptions, t.pending, t.cancelling,
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
                   'locked', exists (
                       select from pg_catalog.pg_locks l
                       where l.locktype = 'advisory' and l.granted and l.objsubid = 1
                         and l.database = (select d.oid from pg_catalog.pg_database d
                                           where d.datname = current_database())
                         and l.classid = (w.id >> 32)::oid and l.objid = (w.id & 4294967295)::oid)))::text
        from stepwell.workers w)
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
