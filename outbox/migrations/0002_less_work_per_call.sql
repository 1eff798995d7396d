-- Purpose: less work in each call. Functions in SQL that cannot be inlined are parsed and planned at every call up to
--   PostgreSQL 17, so those that are called all the time are PL/pgSQL; keys are only looked at where there are any; a claim
--   that finds nothing does not wait for the disk.
-- Transaction: one.
-- Locks: none.

-- A statement that is under way goes on calling these: in another language it would fail (PostgreSQL 18).
create schema stepwell_before_2;
alter function stepwell.current_version(text) set schema stepwell_before_2;
alter function stepwell.enqueue(
    text, json, text, text, int, interval, timestamptz, text, text, jsonb, interval, text) set schema stepwell_before_2;
alter function stepwell.idle_v1(bigint, text[], float8) set schema stepwell_before_2;

create function stepwell.current_version(workflow text) returns text
    language plpgsql stable security definer
    set search_path = pg_catalog, stepwell, pg_temp
as $$
begin
    return (
        select w.version
        from workflows w
        where w.name = workflow
        order by case when count(*) over () > 1 then exists (
                     select from workers k
                     where k.dead_at is null and claimed_as(w.name, w.version) = any (k.names)) end desc,
                 w.seen_at desc
        limit 1);
end
$$;

create or replace function stepwell.enqueue_many(
    workflow text,
    inputs   json[],
    keys     text[]      default null,
    queue    text        default null,
    priority int         default 5,
    delay    interval    default null,
    at       timestamptz default null,
    lane     text        default null,
    tenant   text        default null,
    labels   jsonb       default null,
    deadline interval    default null,
    version  text        default null)
returns table (id uuid, created boolean)
    language plpgsql security definer
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
    many    constant int := coalesce(cardinality(inputs), 0);
    due     constant timestamptz := coalesce(enqueue_many.at, clock_timestamp() + enqueue_many.delay);
    v_queue   text := enqueue_many.queue;
    v_version constant text := coalesce(enqueue_many.version, current_version(enqueue_many.workflow), '');
    ids     uuid[];
    owners  uuid[];
begin
    if v_queue is null then
        select w.queue into v_queue from workflows w where w.name = enqueue_many.workflow and w.version = v_version;
        v_queue := coalesce(v_queue, 'default');
    end if;
    if enqueue_many.workflow is null or octet_length(enqueue_many.workflow) not between 1 and 255 then
        raise exception 'stepwell: the workflow name must have 1 to 255 bytes' using errcode = '22023';
    end if;
    -- The tasks of steps, and of runs with a version, are named so: workers would take this run for one of them.
    if enqueue_many.workflow like 'step:%' or position('@' in enqueue_many.workflow) > 0 then
        raise exception 'stepwell: the workflow name must have no @ and not begin with "step:"' using errcode = '22023';
    end if;
    if octet_length(v_version) > 255 or octet_length(enqueue_many.lane) > 255
       or octet_length(enqueue_many.tenant) > 255 then
        raise exception 'stepwell: version, lane and tenant have at most 255 bytes each' using errcode = '22023';
    end if;
    if octet_length(v_queue) not between 1 and 255 or v_queue = 'stepwell' then
        raise exception 'stepwell: the queue name must have 1 to 255 bytes and not be "stepwell"' using errcode = '22023';
    end if;
    if enqueue_many.priority is null or enqueue_many.priority not between 0 and 9 then
        raise exception 'stepwell: priority must be 0 (first) to 9 (last), not %', enqueue_many.priority
            using errcode = '22023';
    end if;
    if enqueue_many.delay is not null and enqueue_many.at is not null then
        raise exception 'stepwell: give delay or at, not both' using errcode = '22023';
    end if;
    -- No difference to an infinite time can be taken before PostgreSQL 17: each claim and each promotion would fail.
    if not (isfinite(coalesce(enqueue_many.at, 'epoch')) and isfinite(coalesce(enqueue_many.delay, '0'))
            and isfinite(coalesce(enqueue_many.deadline, '0'))) then
        raise exception 'stepwell: at, delay and deadline must be finite' using errcode = '22023';
    end if;
    -- Many a language has no other years: it could not even list such a run among others.
    if due not between '0001-01-02' and '9000-01-01'
       or clock_timestamp() + enqueue_many.deadline not between '0001-01-02' and '9000-01-01' then
        raise exception 'stepwell: at, delay and deadline must end between the years 1 and 9000' using errcode = '22023';
    end if;
    -- Whoever claims, lists or exports a run reads its labels: what jsonb holds beyond this, not everybody can.
    if octet_length(enqueue_many.labels::text) > 65536 then
        raise exception 'stepwell: labels have at most 65,536 bytes as JSON' using errcode = '22023';
    end if;
    if jsonb_typeof(enqueue_many.labels) <> 'object' or jsonb_path_exists(enqueue_many.labels, 'strict $.**{9}')
       or jsonb_path_exists(enqueue_many.labels, '$.** ? (@.type() == "number" && @.abs() > 1e308)') then
        raise exception 'stepwell: labels must be a JSON object, nested 8 levels deep at most, without numbers above 1e308'
            using errcode = '22023';
    end if;
    if enqueue_many.keys is not null and cardinality(enqueue_many.keys) <> many then
        raise exception 'stepwell: % inputs but % keys', many, cardinality(enqueue_many.keys) using errcode = '22023';
    end if;
    if exists (select from unnest(inputs) i where i is null or json_typeof(i) <> 'object') then
        raise exception 'stepwell: the input of a run must be a JSON object, parameter name to value'
            using errcode = '22023', hint = 'for one parameter "lead": {"lead": ...}';
    end if;
    if enqueue_many.keys is not null
       and exists (select from unnest(enqueue_many.keys) k where octet_length(k) > 512) then
        raise exception 'stepwell: a key has more than 512 bytes' using errcode = '22023';
    end if;
    if many = 0 then
        return;
    end if;

    select array_agg(new_id()) into ids from generate_series(1, many);
    owners := ids;
    if enqueue_many.keys is not null and exists (select from unnest(enqueue_many.keys) k where k is not null) then
        loop
            insert into keys (workflow, key, run_id)
            select distinct on (k.key) enqueue_many.workflow, k.key, k.id
            from unnest(enqueue_many.keys, ids) with ordinality as k (key, id, i)
            where k.key is not null
            order by k.key, k.i                                -- of a key given twice the first input counts
            on conflict do nothing;
            -- A statement of its own: it sees what the insert had to wait for.
            select array_agg(case when n.key is null then n.id else k.run_id end order by n.i) into owners
            from unnest(enqueue_many.keys, ids) with ordinality as n (key, id, i)
            left join keys k on k.workflow = enqueue_many.workflow and k.key = n.key;
            exit when array_position(owners, null) is null;    -- else retention took the key just now
        end loop;
    end if;

    insert into runs (id, workflow, version, queue, priority, tenant, lane, labels, input, key, deadline_at)
    select n.id, enqueue_many.workflow, v_version, v_queue, enqueue_many.priority, enqueue_many.tenant,
           enqueue_many.lane, enqueue_many.labels, n.input, n.key, clock_timestamp() + enqueue_many.deadline
    from unnest(ids, owners, inputs, enqueue_many.keys) with ordinality as n (id, owner, input, key, i)
    where n.id = n.owner
    order by n.i;

    insert into tasks (run_id, name, queue, priority, tenant, lane, state, due_at)
    select n.id, claimed_as(enqueue_many.workflow, v_version), v_queue, enqueue_many.priority, enqueue_many.tenant,
           enqueue_many.lane, case when due > clock_timestamp() then 'waiting' else 'ready' end, due
    from unnest(ids, owners) with ordinality as n (id, owner, i)
    where n.id = n.owner
    order by n.i;

    perform ring(v_queue);
    return query select n.owner, n.id = n.owner from unnest(ids, owners) with ordinality as n (id, owner, i) order by n.i;
end
$$;

create function stepwell.enqueue(
    workflow text,
    input    json        default '{}',
    key      text        default null,
    queue    text        default null,
    priority int         default 5,
    delay    interval    default null,
    at       timestamptz default null,
    lane     text        default null,
    tenant   text        default null,
    labels   jsonb       default null,
    deadline interval    default null,
    version  text        default null)
returns uuid
    language plpgsql security definer
    set search_path = pg_catalog, stepwell, pg_temp
as $$
begin
    return (
        select e.id from enqueue_many(
            enqueue.workflow, array[enqueue.input],
            case when enqueue.key is null then null else array[enqueue.key] end,
            enqueue.queue, enqueue.priority, enqueue.delay, enqueue.at, enqueue.lane, enqueue.tenant,
            enqueue.labels, enqueue.deadline, enqueue.version) e);
end
$$;

create or replace function stepwell.claim_v1(
    me bigint, on_queue text, known text[], at_most int, floors bigint[], alone boolean default false,
    max_input bigint default null, max_passed bigint default null)
returns table (
    task bigint, run_id uuid, kind text, name text, attempt int, "position" int, doing int[], wakeups int, seq int,
    interrupted boolean, interruptions int, cancelling boolean, turn bigint, grp int,
    due_in float8, waited float8, deadline_in float8, running_for float8, now timestamptz,
    epoch int, created_at timestamptz, version text, labels text, input text,
    path int[], parent bigint, workflow text, args text, driven int, pending int, signals int,
    seed uuid, key_epoch int, base_epoch int, awaited boolean, oversize int)
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_sort = off set enable_seqscan = off set enable_bitmapscan = off
    set enable_nestloop = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
    ids     bigint[];
    of_runs uuid[];
begin
    perform 1 from workers w where w.id = me and w.dead_at is null for key share;
    if not found then
        raise exception 'stepwell: worker % is not registered or was declared dead', me using errcode = 'SW003';
    end if;

    select array_agg(p.id) into ids
    from (select t.id from tasks t
          where t.state = 'ready' and t.queue = 'stepwell' and t.priority = 0 and not t.fresh
          order by t.turn limit 100 for update skip locked) p;

    if alone then
        ids := ids || array(
            select t.id from tasks t
            where t.state = 'suspect' and t.queue = on_queue and t.name = any (known)
            limit 1 for update skip locked);
    else
        -- One group after the other, each along its own part of the index, until there are enough: a nested loop is
        -- the only way to run this, and row locks are taken as rows are pulled.
        select ids || array_agg(p.id) into ids
        from (select c.id
              from generate_series(0, 19) g
              cross join lateral (
                  select t.id from tasks t
                  where t.state = 'ready' and t.queue = on_queue and t.priority = g / 2 and t.fresh = (g % 2 = 1)
                    and t.turn >= floors[g + 1] and t.name = any (known)
                  order by t.turn limit at_most for update skip locked) c
              limit at_most) p;
    end if;

    if coalesce(cardinality(ids), 0) = 0 then
        -- Nothing to be lost: the lock of the worker's row need not reach the disk before the next claim.
        perform set_config('synchronous_commit', 'off', true);
        return;
    end if;
    with taken as (
        update tasks t
        set state = 'claimed', claimed_by = me, attempt = t.attempt + 1, solo = alone and t.kind in ('run', 'step'),
            started_at = coalesce(t.started_at, clock_timestamp())
        where t.id = any (ids) returning t.run_id, t.kind)
    select array_agg(distinct taken.run_id) filter (where taken.kind <> 'wake') into of_runs from taken;
    delete from doorbell d where d.worker = me;
    return query
        select t.id, t.run_id, t.kind, t.name, t.attempt, t.position, t.doing, t.wakeups, t.seq,
               t.interrupted, t.interruptions, t.cancelling, t.turn, t.priority * 2 + t.fresh::int,
               extract(epoch from t.due_at - clock_timestamp())::float8,
               case when t.attempt = 1 or t.due_at is not null
                    then extract(epoch from clock_timestamp() - coalesce(t.due_at, r.created_at))::float8 end,
               -- What cleans up after a cancellation, or after the deadline itself, has none any more.
               case when r.deadline_at is null or t.kind <> 'run' and noted_cancelled(r.id, r.epoch) then null
                    else extract(epoch from r.deadline_at - clock_timestamp())::float8 end,
               extract(epoch from clock_timestamp() - t.started_at)::float8, clock_timestamp(),
               coalesce(r.epoch, (t.args ->> 'epoch')::int), r.created_at, r.version, r.labels::text,
               case when t.kind = 'run' and given.fits then r.input::text end,
               t.path, t.parent, r.workflow, case when t.kind <> 'step' or given.fits then t.args::text end, t.driven,
               t.pending, t.signals,
               coalesce(r.seed, r.id), r.key_epoch, r.base_epoch, r.parent_path is not null,
               case when not given.fits then size_of(case when t.kind = 'run' then r.input else t.args end) end
        from tasks t
        left join runs r on r.id = any (of_runs) and r.id = t.run_id and t.kind <> 'wake'
        cross join lateral (
            select case t.kind when 'run' then fits(r.input, case when r.parent_id is null and r.base_epoch = 0
                                                                  then max_input else max_passed end)
                               when 'step' then fits(t.args, max_passed)
                               else true end as fits) given
        where t.id = any (ids)
        order by array_position(ids, t.id);
end
$$;

create function stepwell.idle_v1(me bigint, my_queues text[], lease float8) returns void
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
as $$
begin
    insert into doorbell (worker, queue, until)
    select me, q, clock_timestamp() + make_interval(secs => lease) from unnest(my_queues) q order by q
    on conflict on constraint doorbell_pkey do update set until = excluded.until;
end
$$;

revoke all on function stepwell.current_version, stepwell.enqueue, stepwell.idle_v1 from public;

do $$
begin
    if exists (select from pg_roles where rolname = 'stepwell_producer') then
        grant execute on function stepwell.current_version, stepwell.enqueue to stepwell_producer;
    end if;
    if exists (select from pg_roles where rolname = 'stepwell_worker') then
        grant execute on function stepwell.current_version, stepwell.enqueue, stepwell.idle_v1 to stepwell_worker;
    end if;
end
$$;
