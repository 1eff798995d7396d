-- Purpose: the newest runs, before a given one, of one workflow, in one status: each of these optional.
-- Index: four ways to the candidates, of which the status leaves one (a one-time filter each):
--   any, succeeded               primary key of runs, backwards
--   pending, waiting, paused     tasks_identity, backwards: only open runs have a task
--   running                      tasks_claimed: no more is claimed than there are slots; then tasks_identity
--   failed, cancelled, blocked   outbox_unhappy_ends: an index on runs.state would cost every end
-- Locks: none.
-- What is pending, running, waiting and paused is what the view run_status says. A run's own task is named by its workflow,
-- and behind an @ its version.
with claimed as materialized (
    select distinct k.run_id
    from stepwell.tasks k
    where %(status)s::text in ('running', 'waiting', 'paused')
      and k.state = 'claimed' and k.kind not in ('wake', 'deliver'))
select s.id::text, s.workflow, s.status, s.queue, s.priority, s.labels::text, s.epoch, s.created_at, s.started_at,
       s.finished_at, s.deadline_at, r.input::text, r.output::text, r.error::text, s.attempt, s.doing, s.due_at,
       s.task_state, s.claimed_by, s.interruptions, s.version, s.parent_id::text,
       (select p.value::text from stepwell.state p where p.run_id = c.id and p.key = 'progress'), r.key,
       r.trace
from (
    (select r.id
     from stepwell.runs r
     where (%(status)s::text is null or %(status)s::text = 'succeeded')
       and (%(status)s::text is null or r.state = 'succeeded')
       and (%(workflow)s::text is null or r.workflow = %(workflow)s::text)
       and (%(before)s::uuid is null or r.id < %(before)s::uuid)
     order by r.id desc
     limit %(limit)s::int)
    union all
    (select t.run_id
     from stepwell.tasks t
     where %(status)s::text in ('pending', 'waiting', 'paused')
       and t.kind = 'run'
       and t.state <> 'claimed'
       and t.paused = (%(status)s::text = 'paused')
       and (t.paused or (t.attempt = 0 and t.fresh) = (%(status)s::text = 'pending'))
       and (t.driven < 0 or t.run_id not in (select claimed.run_id from claimed))
       and (%(workflow)s::text is null or t.name = %(workflow)s::text
            or starts_with(t.name, %(workflow)s::text || '@'))
       and (%(before)s::uuid is null or t.run_id < %(before)s::uuid)
     order by t.run_id desc
     limit %(limit)s::int)
    union all
    (select t.run_id
     from claimed
     join stepwell.tasks t on t.run_id = claimed.run_id and t.path = '{}' and t.kind not in ('wake', 'deliver')
     where %(status)s::text = 'running'
       and t.kind = 'run'
       and (t.state = 'claimed' or t.driven >= 0)
       and (%(workflow)s::text is null or t.name = %(workflow)s::text
            or starts_with(t.name, %(workflow)s::text || '@'))
       and (%(before)s::uuid is null or t.run_id < %(before)s::uuid)
     order by t.run_id desc
     limit %(limit)s::int)
    union all
    (select distinct r.id
     from stepwell.outbox o
     join stepwell.runs r on r.id = o.run_id
     where %(status)s::text in ('failed', 'cancelled', 'blocked')
       and o.kind = 'run'
       and o.outcome = %(status)s::text
       and o.outcome <> 'succeeded'
       and r.state = %(status)s::text
       and (%(workflow)s::text is null or r.workflow = %(workflow)s::text)
       and (%(before)s::uuid is null or r.id < %(before)s::uuid)
     order by r.id desc
     limit %(limit)s::int)) c
join stepwell.run_status s on s.id = c.id
join stepwell.runs r on r.id = c.id
where %(workflow)s::text is null or r.workflow = %(workflow)s::text
order by c.id desc;
