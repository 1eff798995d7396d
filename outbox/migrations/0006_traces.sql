-- Purpose: runs and signals keep the context of the trace in which they were enqueued and sent, and hand it on to children.
-- Transaction: one.
-- Locks: runs, signals.

alter table stepwell.runs add constraint runs_trace_short check (octet_length(trace) <= 568) not valid;

alter table stepwell.signals
    add column trace text,
    add constraint signals_trace_short check (octet_length(trace) <= 568) not valid;

-- A statement that is under way goes on calling these.
create schema stepwell_before_6;
alter function stepwell.call_child_v1(bigint,uuid,integer[],text,text,text,json,boolean,boolean,boolean,double precision) set schema stepwell_before_6;
alter function stepwell.enqueue(text,json,text,text,integer,interval,timestamp with time zone,text,text,jsonb,interval,text) set schema stepwell_before_6;
alter function stepwell.enqueue_many(text,json[],text[],text,integer,interval,timestamp with time zone,text,text,jsonb,interval,text) set schema stepwell_before_6;
alter function stepwell.signal(uuid,text,json) set schema stepwell_before_6;

create or replace function stepwell.spread_v1(items stepwell.transition_v1[], verdicts int[], extras json) returns void
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_seqscan = off set enable_bitmapscan = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
    mine     constant bigint[] := array(select x.task from unnest(items) x where verdicts[x.i] % 4 = 1);
    settling constant uuid[] := array(
        select x.run_id from json_to_recordset(extras -> 'settled') as d (i int) join unnest(items) x on x.i = d.i);
    emitting constant uuid[] := array(
        select x.run_id from json_to_recordset(extras -> 'emitted') as d (i int) join unnest(items) x on x.i = d.i);
    rung     text[];
begin
    perform drop_calls_v1(x.task, x.run_id, d.path)
    from json_to_recordset(extras -> 'dropped') as d (i int, path int[])
    join unnest(items) x on x.i = d.i where verdicts[x.i] % 4 = 1;

    with made as (
        insert into tasks (run_id, kind, path, name, queue, priority, tenant, fresh, state, due_at, args, parent,
                           wakes, windowed, position, paused)
        select x.run_id, d.kind, d.path, d.name,
               case when d.kind = 'step' then coalesce(d.queue, t.queue) else 'stepwell' end,
               case when d.kind = 'step' then t.priority else 0 end, t.tenant, false,
               case when d.kind = 'window' or coalesce(d.held, false) then 'waiting' when t.paused then 'paused'
                    when d.kind = 'step' then 'ready' else 'waiting' end,
               coalesce(d.until, clock_timestamp() + make_interval(secs => d.delay)), d.args, x.task,
               coalesce(d.wakes, 0), coalesce(d.windowed, false), coalesce(d.released, 0), t.paused
        from json_to_recordset(extras -> 'tasks') as d (
                i int, kind text, path int[], name text, queue text, args json, delay float8, until timestamptz,
                wakes smallint, held boolean, windowed boolean, released int)
        join unnest(items) x on x.i = d.i
        join tasks t on t.id = any (mine) and t.id = x.task
        where verdicts[x.i] % 4 = 1
        order by x.i, d.path
        on conflict do nothing
        returning parent, wakes, queue, state),
    counted as (
        update tasks t set pending = t.pending + m.count
        from (select made.parent, count(*) from made where made.wakes in (1, 2) group by made.parent) m
        where t.id = any (mine) and t.id = m.parent)
    select array_agg(distinct made.queue) into rung from made where made.state = 'ready';
    perform ring(q) from unnest(rung) q;

    perform call_child_v1(x.task, x.run_id, d.path, d.workflow, d.version, d.queue, d.input, d.counted, d.detached, d.begun,
                          d.deadline, d.trace)
    from json_to_recordset(extras -> 'children') as d (
            i int, path int[], workflow text, version text, queue text, input json, counted boolean, detached boolean,
            begun boolean, deadline float8, trace text)
    join unnest(items) x on x.i = d.i where verdicts[x.i] % 4 = 1;

    with adopted as (
        update tasks c set wakes = 1
        from json_to_recordset(extras -> 'settled') as d (i int, path int[])
        join unnest(items) x on x.i = d.i
        where verdicts[x.i] % 4 = 1 and c.run_id = any (settling) and c.run_id = x.run_id
          and c.kind not in ('wake', 'deliver') and c.kind = 'step' and c.wakes = 0 and c.path >= d.path and c.path < beyond(d.path)
        returning c.parent)
    update tasks t set pending = t.pending + a.count
    from (select adopted.parent, count(*) from adopted group by adopted.parent) a
    where t.id = any (mine) and t.id = a.parent;

    delete from signals s
    where s.id = any (array(
        select d.signal from json_to_recordset(extras -> 'taken') as d (i int, signal bigint)
        where verdicts[d.i] % 4 = 1));

    insert into state as s (run_id, key, value)
    select x.run_id, d.key, coalesce(d.value, 'null')      -- a JSON null comes as an SQL one
    from json_to_recordset(extras -> 'states') as d (i int, key text, value json)
    join unnest(items) x on x.i = d.i where verdicts[x.i] % 4 = 1
    on conflict (run_id, key) do update set value = excluded.value, at = clock_timestamp();

    -- A retry emits the same again; after a rewind or a fresh start it is something new.
    insert into stream (run_id, epoch, n, name, value)
    select x.run_id, r.key_epoch, d.n, d.name, coalesce(d.value, 'null')
    from json_to_recordset(extras -> 'emitted') as d (i int, n int, name text, value json)
    join unnest(items) x on x.i = d.i
    join runs r on r.id = any (emitting) and r.id = x.run_id
    where verdicts[x.i] % 4 = 1
    on conflict do nothing;

    perform wake(x.run_id, 'poison', json_build_object('epoch', d.epoch, 'reason', d.reason))
    from json_to_recordset(extras -> 'stopping') as d (i int, epoch int, reason json)
    join unnest(items) x on x.i = d.i where verdicts[x.i] % 4 = 1;

    perform continue_v1(x.task, x.records, d.input)
    from json_to_recordset(extras -> 'continued') as d (i int, input json)
    join unnest(items) x on x.i = d.i where verdicts[x.i] % 4 = 1;
end
$$;

create function stepwell.call_child_v1(
    of_task bigint, of_run uuid, at_path int[], workflow text, version text, on_queue text, input json,
    is_counted boolean, is_detached boolean, is_begun boolean, deadline float8, trace text default null)
returns void
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
    parent runs;
    child  runs;
    of_key text;
    as_signal constant text := 'stepwell:child:' || array_to_string(at_path, '.');
begin
    select * into parent from runs r where r.id = of_run;
    select * into child from runs r
    where r.parent_id = of_run and r.parent_path = at_path for update;      -- it may be ending just now
    if found and child.state in ('open', 'blocked') and is_cancelled(child.id, child.epoch) then
        update runs r set parent_path = null where r.id = child.id;
    elsif found then
        -- What it is about to report is waited for anew; what it has reported was.
        is_counted := coalesce(is_counted, false)
                      and (child.state <> 'succeeded'
                           or not exists (select from signals s where s.run_id = of_run and s.name = as_signal));
        if child.state in ('failed', 'cancelled', 'blocked') then
            delete from signals s where s.run_id = of_run and s.name = as_signal;
            update tasks t set signals = (select count(*) from signals s where s.run_id = of_run) where t.id = of_task;
            if retry(child.id) is null then
                perform rewind(child.id, '{}');                -- what it had done is undone: it begins again
            end if;
        end if;
        update runs r set counted = is_counted where r.id = child.id and r.counted <> is_counted;
        if is_counted then
            update tasks t set pending = t.pending + 1 where t.id = of_task;
        end if;
        if child.state = 'succeeded'
           and not exists (select from signals s where s.run_id = of_run and s.name = as_signal) then
            perform report_v1(array[child.id]);
        end if;
        return;
    end if;
    of_key := parent.workflow || ':' || parent.key || ':' || array_to_string(at_path, '.');
    if octet_length(of_key) > 512 then
        of_key := 'md5:' || md5(of_key);
    end if;
    insert into runs (id, workflow, version, queue, priority, tenant, labels, input, key, parent_id, parent_path, counted,
                      detached, begun, deadline_at, trace)
    values (new_id(), call_child_v1.workflow, coalesce(call_child_v1.version, ''), coalesce(on_queue, parent.queue),
            parent.priority, parent.tenant, parent.labels, call_child_v1.input, of_key, of_run, at_path,
            coalesce(is_counted, false), coalesce(is_detached, false), coalesce(is_begun, false),
            clock_timestamp() + make_interval(secs => call_child_v1.deadline), coalesce(call_child_v1.trace, parent.trace))
    returning * into child;
    insert into keys (workflow, key, run_id)
    select child.workflow, child.key, child.id where child.key is not null
    on conflict do nothing;
    insert into tasks (run_id, name, queue, priority, tenant, fresh)
    values (child.id, claimed_as(child.workflow, child.version), child.queue, child.priority, child.tenant, false);
    if child.counted then
        update tasks t set pending = t.pending + 1 where t.id = of_task;
    end if;
    perform ring(child.queue);
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
    version  text        default null,
    trace    text        default null)
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
            enqueue.labels, enqueue.deadline, enqueue.version, enqueue.trace) e);
end
$$;

create function stepwell.enqueue_many(
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
    version  text        default null,
    trace    text        default null)
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
    if enqueue_many.trace is not null then
        perform require_trace(enqueue_many.trace);
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

    insert into runs (id, workflow, version, queue, priority, tenant, lane, labels, input, key, deadline_at, trace)
    select n.id, enqueue_many.workflow, v_version, v_queue, enqueue_many.priority, enqueue_many.tenant,
           enqueue_many.lane, enqueue_many.labels, n.input, n.key, clock_timestamp() + enqueue_many.deadline,
           enqueue_many.trace
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

create function stepwell.require_trace(trace text) returns void
    language plpgsql immutable
    set search_path = pg_catalog, stepwell, pg_temp
as $$
begin
    if trace !~ '^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}( [ -~]+)?$'
       or trace ~ '^(ff|..-0{32}|.{36}0{16})' or octet_length(trace) > 568 then
        raise exception 'stepwell: trace must be a W3C traceparent (00-TRACE-SPAN-FLAGS in lower-case hex), behind a space a tracestate if there is one'
            using errcode = '22023';
    end if;
end
$$;

create function stepwell.signal(run uuid, name text, payload json default 'null', trace text default null) returns boolean
    language plpgsql security definer
    set search_path = pg_catalog, stepwell, pg_temp
as $$
begin
    if signal.name is null or octet_length(signal.name) not between 1 and 255 or signal.name like 'stepwell:%' then
        raise exception 'stepwell: a signal''s name must have 1 to 255 bytes and not begin with "stepwell:"'
            using errcode = '22023';
    end if;
    if signal.trace is not null then
        perform require_trace(signal.trace);
    end if;
    if not exists (select from runs r where r.id = run and r.state in ('open', 'blocked')) then
        return false;
    end if;
    insert into signals (run_id, name, payload, trace)
    values (run, signal.name, coalesce(signal.payload, 'null'), signal.trace);
    perform wake(run, 'signal', json_build_object('name', signal.name));
    return true;
end
$$;

revoke all on function stepwell.call_child_v1(bigint,uuid,integer[],text,text,text,json,boolean,boolean,boolean,double precision,text), stepwell.enqueue(text,json,text,text,integer,interval,timestamp with time zone,text,text,jsonb,interval,text,text), stepwell.enqueue_many(text,json[],text[],text,integer,interval,timestamp with time zone,text,text,jsonb,interval,text,text), stepwell.require_trace(text), stepwell.signal(uuid,text,json,text) from public;

do $$
begin
    if exists (select from pg_roles where rolname = 'stepwell_producer') then
        grant execute on function stepwell.enqueue(text,json,text,text,integer,interval,timestamp with time zone,text,text,jsonb,interval,text,text), stepwell.enqueue_many(text,json[],text[],text,integer,interval,timestamp with time zone,text,text,jsonb,interval,text,text), stepwell.signal(uuid,text,json,text) to stepwell_producer;
    end if;
end
$$;

do $$
begin
    if exists (select from pg_roles where rolname = 'stepwell_worker') then
        grant execute on function stepwell.call_child_v1(bigint,uuid,integer[],text,text,text,json,boolean,boolean,boolean,double precision,text), stepwell.enqueue(text,json,text,text,integer,interval,timestamp with time zone,text,text,jsonb,interval,text,text), stepwell.enqueue_many(text,json[],text[],text,integer,interval,timestamp with time zone,text,text,jsonb,interval,text,text), stepwell.require_trace(text), stepwell.signal(uuid,text,json,text) to stepwell_worker;
    end if;
end
$$;
