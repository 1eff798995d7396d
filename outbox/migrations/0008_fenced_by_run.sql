-- Purpose: a transition counts for a task only if that is of the same run, and of the same call. A database that was put
--   back gives ids of tasks once more; a worker that was at work meanwhile could have written the end of a run that is gone
--   over that of another.
-- Transaction: one.
-- Locks: none.

create or replace function stepwell.flush_v1(me bigint, transitions json, records json, ends json, extras json default null)
returns int[]
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_seqscan = off set enable_bitmapscan = off
    set enable_nestloop = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
    items    transition_v1[];
    locking  bigint[];
    verdicts int[];
    known    int;
    closing  uuid[];
    parents  bigint[];
    waking   boolean;
    leaving  boolean;
begin
    perform pg_try_advisory_xact_lock_shared(-me);             -- as in claim_v1
    -- What follows is begun once this is committed, so this has to be durable, whatever a step, the role, or somebody else
    -- whom a pooler has lent this session has asked for (I7).
    if current_setting('synchronous_commit') in ('off', 'local') then
        perform set_config('synchronous_commit', 'on', true);
    end if;
    select array_agg(x order by x.i), array_agg(x.task), array_agg(x.run_id) filter (where x.then = 'finish'),
           array_agg(x.parent) filter (where x.parent is not null),
           bool_or(x.then = 'wake'), bool_or(x.then = 'release')
    into items, locking, closing, parents, waking, leaving
    from json_populate_recordset(null::transition_v1, transitions) x;
    if parents is not null then
        locking := locking || parents;
    end if;
    if waking then
        locking := locking || array(
            select t.id from tasks t
            where t.run_id = any (array(select x.run_id from unnest(items) x where x.then = 'wake'))
              and t.path = '{}' and t.kind not in ('wake', 'deliver'));
    end if;
    perform 1 from tasks t where t.id = any (locking) order by t.id for update;

    select array_agg(
        case when t.attempt = x.attempt and t.claimed_by = me then
                  case when t.position > x.position then 2 when t.position < x.position then 0
                       when x.strict and t.seq <> x.seen then 3 else 1 end
             when t.attempt = x.attempt and t.claimed_by is null and t.position = x.position + 1 then 2
             else 0 end
        + case when t.cancelling then 4 else 0 end + case when t.paused then 8 else 0 end
        order by x.i)
    into verdicts
    -- Not by its id alone: a database that was put back, from a backup or by a failover that lost something, gives ids of
    -- tasks once more, maybe to a worker that still executes what had this one before: another run, or another call.
    from unnest(items) x left join tasks t on t.id = any (locking) and t.id = x.task and t.run_id = x.run_id
        and (x.parent is null or x.doing is null or t.path = x.doing);

    -- A resend whose row went on or is gone: the history knows whether it was applied (I10).
    if verdicts && array[0, 4, 8, 12] then
        for known in select recorded_v1(me, items, flush_v1.records) loop
            if verdicts[known] % 4 = 0 then
                verdicts[known] := 2;
            end if;
        end loop;
    end if;

    with written as (
        insert into outbox (run_id, epoch, path, n, seq, kind, name, fingerprint, outcome, value, error, worker, at)
        select x.run_id, x.epoch, r.path, r.n, t.seq + r.k, r.kind, r.name, r.fingerprint, r.outcome, r.value, r.error,
               me, r.at
        from json_to_recordset(records) as r (
                i int, k int, path int[], n int, kind text, name text, fingerprint bigint, outcome text,
                value json, error json, at timestamptz)
        join unnest(items) x on x.i = r.i
        join tasks t on t.id = any (locking) and t.id = x.task
        where verdicts[r.i] % 4 = 1 and x.parent is null
        returning kind, name, outcome)
    insert into counters as c (shard, kind, name, outcome, value)
    select pg_backend_pid() % 64, w.kind, w.name, w.outcome, count(*)
    from written w where w.kind in ('run', 'step')
    group by w.kind, w.name, w.outcome order by w.kind, w.name, w.outcome
    on conflict (shard, kind, name, outcome) do update set value = c.value + excluded.value;

    if extras is not null then
        perform spread_v1(items, verdicts, extras);
    end if;

    -- A move touches no indexed column, so it stays within its page (HOT). A suspect that is given back without
    -- progress remains one.
    update tasks t
    set position = t.position + 1,
        seq = t.seq + x.records + (x.then = 'continue')::int,
        -- What was recorded meanwhile nobody waits for, or the drive was not allowed to record: see strict. Only patches
        -- are recorded whatever else was, and say nothing of it.
        driven = case when x.then = 'continue' then -1 when x.then = 'release' then t.driven
                      when x.records > coalesce(x.asides, 0) then t.seq + x.records
                      else greatest(t.driven, x.seen) end,
        pending = case when x.then = 'continue' then 0 else t.pending end,
        doing = case when x.then = 'release' then t.doing else x.doing end,
        awaits = case when x.then = 'release' then t.awaits else x.awaits end,
        signals = case when x.then = 'continue' then (select count(*) from signals s where s.run_id = t.run_id)
                       else t.signals - coalesce(x.took, 0) end,
        cancelling = t.cancelling and x.cancelled is null,
        interrupted = t.interrupted and x.then = 'release',
        interruptions = case when x.then = 'release' or x.doing is not distinct from t.doing
                                  or (t.doing is null and t.interrupted) then t.interruptions else 0 end,
        solo_deaths = case when x.then = 'release' or x.doing is not distinct from t.doing
                                or (t.doing is null and t.interrupted) then t.solo_deaths else 0 end,
        claimed_by = case when x.then = 'move' then me end,
        state = case when x.then = 'move' then 'claimed'
                     when t.paused then 'paused'
                     when x.then = 'park' and t.wakeups = x.wakeups and (not t.cancelling or x.cancelled)
                          and (x.delay is not null or x.until is not null or x.awaits is not null or t.pending > 0)
                     then 'waiting'
                     when t.interruptions >= 2
                          and (x.then = 'release' or x.doing is not distinct from t.doing
                               or (t.doing is null and t.interrupted)) then 'suspect'
                     else 'ready' end,
        fresh = case when x.then = 'move' then t.fresh else false end,
        turn = case when x.then = 'move' then t.turn else nextval('stepwell.turns') end,
        due_at = case when x.then = 'release' then t.due_at
                      when x.then = 'park' then coalesce(x.until, clock_timestamp() + make_interval(secs => x.delay)) end
    from unnest(items) x
    where t.id = any (locking) and t.id = x.task and x.parent is null
      and verdicts[x.i] % 4 = 1 and x.then in ('move', 'park', 'release', 'continue');

    if closing is not null then
        update runs r
        set state = e.state, output = e.output, error = e.error, finished_at = clock_timestamp(),
            started_at = coalesce(r.started_at, t.started_at)
        from json_to_recordset(ends) as e (i int, state text, output json, error json)
        join unnest(items) x on x.i = e.i
        join tasks t on t.id = any (locking) and t.id = x.task
        where r.id = any (closing) and r.id = x.run_id and verdicts[e.i] % 4 = 1;
        delete from tasks t
        where t.id = any (array(select x.task from unnest(items) x where x.then = 'finish' and verdicts[x.i] % 4 = 1));
        if extras is not null then
            perform end_families_v1(array(
                select x.run_id from unnest(items) x where x.then = 'finish' and verdicts[x.i] % 4 = 1));
        end if;
    end if;
    if parents is not null then
        -- A call that its run has dropped, or ended with, in this very flush has nobody to be recorded for.
        if closing is not null or extras is not null then
            select array_agg(case when x.parent is not null and t.id is null and verdicts[x.i] % 4 = 1
                                  then 0 else verdicts[x.i] end order by x.i)
            into verdicts
            from unnest(items) x left join tasks t on t.id = any (locking) and t.id = x.task;
        end if;
        perform settle_v1(me, items, verdicts, flush_v1.records);
    end if;
    if waking then
        perform stepwell.wake_v1(me, items, verdicts);
    end if;
    if leaving then
        perform ring(q.queue) from (
            select distinct t.queue from tasks t
            where t.id = any (array(select x.task from unnest(items) x where x.then = 'release'))) q;
    end if;
    return verdicts;
end
$$;
