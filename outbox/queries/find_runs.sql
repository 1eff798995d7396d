-- Purpose: the ids of runs of one workflow, in one status, with a text in their error, enqueued in the last seconds: each
--   of these optional. The oldest first.
-- Index: three ways to the candidates, of which the status leaves one (a one-time filter each):
--   any, succeeded                     primary key of runs, from the moment on
--   pending, running, waiting, paused  tasks_identity: only open runs have a task
--   failed, cancelled, blocked, or any with an error   outbox_unhappy_ends
-- Locks: none.
-- An id begins with the milliseconds of its time.
with asked as materialized (
    select (lpad(to_hex(greatest(0, floor((extract(epoch from statement_timestamp()) - %(since)s::float8) * 1000))::bigint),
                 12, '0') || repeat('0', 20))::uuid as first),
candidates as (
    select r.id
    from stepwell.runs r
    where (%(status)s::text is null or %(status)s::text = 'succeeded') and %(error_like)s::text is null
      and (%(since)s::float8 is null or r.id >= (select a.first from asked a))
    union all
    select t.run_id
    from stepwell.tasks t
    where %(status)s::text in ('pending', 'running', 'waiting', 'paused') and %(error_like)s::text is null
      and t.kind = 'run'
      and (%(since)s::float8 is null or t.run_id >= (select a.first from asked a))
    union
    select o.run_id
    from stepwell.outbox o
    where (%(status)s::text in ('failed', 'cancelled', 'blocked')
           or %(status)s::text is null and %(error_like)s::text is not null)
      and o.kind = 'run' and o.outcome <> 'succeeded'
      and o.outcome = coalesce(%(status)s::text, o.outcome)
      and (%(since)s::float8 is null or o.run_id >= (select a.first from asked a)))
select r.id::text
from candidates c
join stepwell.runs r on r.id = c.id
where (%(workflow)s::text is null or r.workflow = %(workflow)s::text)
  and (%(error_like)s::text is null
       or position(lower(%(error_like)s::text)
                   in lower(concat_ws(' ', r.error ->> 'type', r.error ->> 'message', r.error ->> 'reason'))) > 0)
  and (%(status)s::text is null
       or (select s.status from stepwell.run_status s where s.id = r.id) = %(status)s::text)
order by r.id
limit %(limit)s::int;
