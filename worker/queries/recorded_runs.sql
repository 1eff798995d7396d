-- Purpose: runs to export or to rehearse, a page of them in order of id: given ones, else all from a moment on, else
--   those that have not ended.
-- Index: primary key of runs · for those that have not ended tasks_identity (an open run has a task) and
--   outbox_unhappy_ends (a blocked one has a record that says so).
-- Locks: none.
select r.id, r.workflow, r.version, r.state, r.created_at, r.epoch, r.key_epoch, r.seed, r.labels::text, r.input::text
from (
    (select r.id
     from stepwell.runs r
     where %(ids)s::uuid[] is not null and r.id = any(%(ids)s::uuid[]) and r.id > %(after)s::uuid
     order by r.id
     limit %(limit)s::int)
    union all
    (select r.id
     from stepwell.runs r
     where %(ids)s::uuid[] is null and %(first)s::uuid is not null
       and r.id >= %(first)s::uuid and r.id > %(after)s::uuid
       and (%(workflow)s::text is null or r.workflow = %(workflow)s::text)
     order by r.id
     limit %(limit)s::int)
    union all
    (select t.run_id
     from stepwell.tasks t
     where %(ids)s::uuid[] is null and %(first)s::uuid is null
       and t.kind = 'run' and t.run_id > %(after)s::uuid
       and (%(workflow)s::text is null or t.name = %(workflow)s::text
            or starts_with(t.name, %(workflow)s::text || '@'))
     order by t.run_id
     limit %(limit)s::int)
    union all
    (select distinct r.id
     from stepwell.outbox o
     join stepwell.runs r on r.id = o.run_id
     where %(ids)s::uuid[] is null and %(first)s::uuid is null
       and o.kind = 'run' and o.outcome = 'blocked' and o.outcome <> 'succeeded'
       and r.state = 'blocked' and r.id > %(after)s::uuid
       and (%(workflow)s::text is null or r.workflow = %(workflow)s::text)
     order by r.id
     limit %(limit)s::int)) c
join stepwell.runs r on r.id = c.id
order by r.id
limit %(limit)s::int;
