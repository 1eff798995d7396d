-- Stepwell: the whole database, in reading order.
--
--   1. tables       what is known: runs, keys, tasks, outbox, signals, state, stream, workers, workflows,
--                   counters, doorbell
--   2. producers    the public functions, callable from any language inside the caller's transaction:
--                   enqueue, enqueue_many, signal, cancel; for operators retry, rewind, fork, resolve, pause,
--                   resume, forget; the view run_status
--   3. claimants    the protocol of the workers: register, claim, flush, promote, shelve, reclaim
--   4. roles        stepwell_producer, stepwell_worker, stepwell_viewer
--
-- Two rules hold everywhere.
--   * What a producer runs only INSERTS (invariant I15): its transaction may stay open for an hour, so
--     it never updates, deletes or locks a row that a worker touches.
--   * Every write of a claimant is fenced by (task, attempt, worker, position): a worker that lost its
--     claim changes nothing any more (invariant I8).
--
-- Payloads are json, not jsonb: the exact text that was encoded, so that a replay sees what the live
-- run saw. One that was sealed by who wrote it is {"stepwell:sealed": {"k": id of the key, "d": data}}; nothing here
-- looks into payloads, but that the input of a run is an object, and an error has a type. Times are those of the database's clock. `stepwell migrate` installs this file.

create schema stepwell;

comment on schema stepwell is 'Durable workflows: see schema.sql of the Stepwell distribution.';


-- =====================================================================================================
-- 1. Tables
-- =====================================================================================================

create table stepwell.migrations (
    version    int primary key,
    name       text not null,
    applied_at timestamptz not null default clock_timestamp()
);

-- A time-ordered UUID (version 7): 48 bits of milliseconds, then random bits. PostgreSQL 18 has
-- uuidv7(); this works on every supported version.
create function stepwell.new_id() returns uuid
    language sql volatile parallel safe
as $$
    select encode(
        set_bit(set_bit(
            overlay(uuid_send(gen_random_uuid())
                    placing substring(int8send((extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
                    from 1 for 6),
            52, 1), 53, 1),
        'hex')::uuid
$$;

-- One row for each durable invocation of a workflow. Wide and cold: written at enqueue and at the end,
-- never in between; whether an open run is pending, running or waiting is derived from its task (view
-- run_status). `blocked` needs a person.
create table stepwell.runs (
    id          uuid primary key,
    workflow    text not null,
    version     text not null default '',
    queue       text not null default 'default',
    priority    smallint not null default 5,
    tenant      text,
    lane        text,
    labels      jsonb,
    input       json not null,
    key         text,                              -- as in keys; a child's is made from its parent's
    parent_id   uuid,                              -- the run that has called this one
    parent_path int[],                             -- … and by which call; null once nobody waits for it any more
    counted     boolean not null default false,    -- the parent counts it among its pending calls
    detached    boolean not null default false,    -- not cancelled with its parent
    begun       boolean not null default false,    -- by itself, not called: the join that it was begun in may be over
    deadline_at timestamptz,
    trace       text,                              -- who enqueued it: W3C traceparent, behind a space tracestate
    seed        uuid,                              -- what random() and uuid() draw from; null: the id
    epoch       int not null default 0,            -- retries, rewinds, fresh starts
    base_epoch  int not null default 0,            -- where the history begins that still counts: the last fresh start
    key_epoch   int not null default 0,            -- the last rewind or fresh start: part of idempotency keys
    created_at  timestamptz not null default clock_timestamp(),
    started_at  timestamptz,
    finished_at timestamptz,
    state       text not null default 'open',
    output      json,
    error       json,                              -- {"type", "message", "data"?, "trace"?}; sealed but for the type
    forgotten_at timestamptz,                      -- when its payloads were erased: see forget
    constraint runs_workflow_named check (octet_length(workflow) between 1 and 255),
    constraint runs_priority_range check (priority between 0 and 9),
    constraint runs_input_object   check (json_typeof(input) = 'object'),
    constraint runs_trace_short    check (octet_length(trace) <= 568),
    constraint runs_state_known    check (state in ('open', 'succeeded', 'failed', 'cancelled', 'blocked')),
    constraint runs_ends_have_time check ((state = 'open') = (finished_at is null))
) with (fillfactor = 60);

alter table stepwell.runs alter column input set storage external, alter column output set storage external;

-- A call makes one child, however often it is driven.
create unique index runs_children on stepwell.runs (parent_id, parent_path) where parent_path is not null;
-- Those that nobody waits for any more: they still hold what they were called with.
create index runs_orphans on stepwell.runs (parent_id) where parent_id is not null and parent_path is null;

-- Idempotency: the first run of a (workflow, key). Apart from runs, so that runs and outbox can be
-- partitioned on the time-ordered id.
create table stepwell.keys (
    workflow   text not null,
    key        text not null,
    run_id     uuid not null,
    expires_at timestamptz,
    primary key (workflow, key),
    constraint keys_key_short check (octet_length(key) <= 512)
);

-- The order in which tasks become ready. Drawn again each time a task becomes ready, never at creation
-- alone: what was woken, retried or reclaimed queues by when it became ready.
create sequence stepwell.turns;

-- One row for each claimable thing; it exists only while there is something left to do. Narrow and hot.
--   run      a run to advance (path '{}')
--   step     a step to execute on its own (path of the call)
--   timer    a wait among other calls (path of the call); applied by any worker when it is due
--   window   how far the items of a map with a limit have been readied (path of the join)
--   wake     a fact to apply to a run that another transaction must not lock: cancel, signal, poison
--   deliver  a message to deliver
-- States: ready (claimable) · claimed · waiting (for due_at or for others) · shelved (ready, but no live
-- worker knows its name) · suspect (ready, but two claims of it died: it is tried alone) · paused.
-- What a claimant must know is a name: of a workflow, with @version if it has one; of a step, behind "step:".
--
-- A call that is a task of its own (`parent` is the run's task) wakes its run when it is done:
--   wakes 1 when the last of those that are counted in `pending` is done · 2 as 1, and when it has failed
--         3 in any case, and is not counted · 0 never: nobody waits for it any more
-- `driven` is the seq up to which a drive of the run has been written down: what its body did in answer to
-- these records, the calls that it made among it, is in the database. -1: nothing is.
create table stepwell.tasks (
    id            bigint generated always as identity primary key,
    run_id        uuid not null,
    kind          text not null default 'run',
    path          int[] not null default '{}',
    name          text not null,                       -- what the claimant must know: workflow or step
    queue         text not null default 'default',
    priority      smallint not null default 5,
    fresh         boolean not null default true,       -- never claimed; resumed work (false) goes first
    turn          bigint not null default nextval('stepwell.turns'),
    tenant        text,
    lane          text,
    state         text not null default 'ready',
    due_at        timestamptz,                         -- kept while `doing` waits for it, also once ready
    attempt       int not null default 0,              -- how often it was claimed
    doing         int[],                               -- the call that the run's own task is at
    position      int not null default 0,              -- transitions made by claimants; part of the fence
    seq           int not null default 0,              -- last seq drawn for the run's history
    interrupted   boolean not null default false,      -- the last claim died and that is not recorded yet
    interruptions int not null default 0,              -- claims that died at `doing`
    solo_deaths   int not null default 0,              -- those among them that had nothing else in flight
    solo          boolean not null default false,      -- this claim has the worker for itself
    cancelling    boolean not null default false,
    wakeups       int not null default 0,
    pending       int not null default 0,              -- completions that a join still waits for
    driven        int not null default -1,
    awaits        text[],                              -- the signals that the run waits for; 'stepwell:child': any result
    signals       int not null default 0,              -- how many are there, as far as wakes have told
    paused        boolean not null default false,
    parent        bigint,
    wakes         smallint not null default 0,
    windowed      boolean not null default false,      -- being done, it readies the next item of its window
    claimed_by    bigint,
    started_at    timestamptz,                         -- first claim
    args          json,
    constraint tasks_kind_known    check (kind in ('run', 'step', 'timer', 'window', 'wake', 'deliver')),
    constraint tasks_state_known   check (state in ('ready', 'claimed', 'waiting', 'shelved', 'suspect', 'paused')),
    constraint tasks_claim_owned   check ((state = 'claimed') = (claimed_by is not null)),
    constraint tasks_priority_range check (priority between 0 and 9),    -- claims look at no others
    constraint tasks_pending_count check (pending >= 0)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
        autovacuum_analyze_scale_factor = 0.1, autovacuum_vacuum_cost_delay = 0);

alter table stepwell.tasks alter column args set storage external;

-- The identity of a run's task and of those of its calls. Wakes have none: any number may be under way.
create unique index tasks_identity on stepwell.tasks (run_id, path) where kind not in ('wake', 'deliver');
create index tasks_ready   on stepwell.tasks (queue, priority, fresh, turn) where state = 'ready';
create index tasks_due     on stepwell.tasks (due_at) where state = 'waiting' and due_at is not null;
create index tasks_claimed on stepwell.tasks (claimed_by) where state = 'claimed';
create index tasks_set_aside on stepwell.tasks (state, queue, name, turn) where state in ('shelved', 'suspect');

-- What has happened and will not be done again: append-only, one row for each execution of a step
-- (n = 0 the final outcome, n >= 1 the nth execution that failed or was interrupted), each finished
-- sleep, each signal or result of a child that was taken, each patch (path '{0,k}'), and, at path '{}',
-- each end of a run (n = 0), new epoch (1) and cancellation (2).
-- I9: at most one final outcome for each (run, epoch, path). The primary key says so.
create table stepwell.outbox (
    run_id      uuid not null,
    epoch       int not null,
    path        int[] not null,
    n           int not null,
    seq         int not null,             -- the order in which things happened in the run
    kind        text not null,
    name        text not null,
    fingerprint bigint,                   -- of the arguments
    outcome     text not null,
    value       json,
    error       json,
    worker      bigint,
    at          timestamptz not null default clock_timestamp(),
    primary key (run_id, epoch, path, n),
    constraint outbox_kind_known check (kind in ('step', 'sleep', 'signal', 'child', 'patch', 'run', 'epoch', 'cancel')),
    constraint outbox_outcome_fits check (case
        when kind = 'run'   then n = 0 and path = '{}' and outcome in ('succeeded', 'failed', 'cancelled', 'blocked')
        when kind = 'epoch' then n = 1 and path = '{}' and outcome in ('retry', 'resolve', 'rewind', 'fork', 'continue')
        when kind = 'cancel' then n = 2 and path = '{}' and outcome = 'cancelled'
        when n = 0          then outcome in ('completed', 'failed')
        else n > 0 and outcome in ('failed', 'interrupted') end)
) with (fillfactor = 100);

alter table stepwell.outbox alter column value set storage external;

-- Finds the ends that somebody may have to look at without an index on runs that every end would touch.
create index outbox_unhappy_ends on stepwell.outbox (outcome, at) where kind = 'run' and outcome <> 'succeeded';
-- The forks of a run hold a copy of its payloads.
create index outbox_forks on stepwell.outbox ((value ->> 'of')) where kind = 'epoch' and outcome = 'fork';

-- What was sent to a run and not taken yet, first in, first out for each name: signals, and the results of
-- children (name 'stepwell:child:' and the path of the call). A row is deleted by the flush that records it.
create table stepwell.signals (
    id      bigint generated always as identity primary key,
    run_id  uuid not null,
    name    text not null,
    payload json,
    at      timestamptz not null default clock_timestamp(),
    trace   text,                                  -- who sent it, as in runs
    constraint signals_name_short  check (octet_length(name) between 1 and 255),
    constraint signals_trace_short check (octet_length(trace) <= 568)
);

alter table stepwell.signals alter column payload set storage external;

create index signals_of_run on stepwell.signals (run_id, id);

-- What a run shows of itself while it runs: the latest value of each key.
create table stepwell.state (
    run_id uuid not null,
    key    text not null,
    value  json not null,
    at     timestamptz not null default clock_timestamp(),
    primary key (run_id, key)
) with (fillfactor = 80);

-- What a run emits while it runs, in order. Numbered by the body, so that what is sent again changes nothing.
create table stepwell.stream (
    run_id uuid not null,
    epoch  int not null,
    n      int not null,
    name   text not null,
    value  json not null,
    at     timestamptz not null default clock_timestamp(),
    primary key (run_id, epoch, n)
);

-- One row for each worker process that may hold claims. The supervisor beats for its children; an
-- observer that sees no change declares it dead (dead_at): from then on it claims nothing.
create table stepwell.workers (
    id         bigint primary key check (id > 0),
    supervisor bigint,
    host       text not null,
    pid        int not null,
    release    text not null default '',
    queues     text[] not null,
    names      text[] not null,
    beat       bigint not null default 0,
    locking    boolean not null default true,     -- its supervisor has a session to hold its lock in; false: the lease alone counts
    started_at timestamptz not null default clock_timestamp(),
    dead_at    timestamptz
) with (fillfactor = 50);

-- What the workers know, so that producers can check a name and an input before they enqueue.
create table stepwell.workflows (
    name         text not null,
    version      text not null default '',
    input_schema json not null,
    queue        text not null default 'default',
    seen_at      timestamptz not null default clock_timestamp(),
    primary key (name, version)
);

-- Exact totals: counted by the very statement that records what it counts. Sharded by backend, so that
-- two flushes seldom meet on a row: 0 to 63 what claimants wrote, 64 to 127 what end_v1 did, 128 what bury_v1 did.
create table stepwell.counters (
    shard   smallint not null,
    kind    text not null,                -- run, step, worker
    name    text not null,                -- of the workflow, of the step, of what noticed that the worker is dead
    outcome text not null,
    value   bigint not null,
    primary key (shard, kind, name, outcome)
) with (fillfactor = 50);

-- Idle workers hold a short lease here; only then does enqueue ring (I1: a busy system sends no NOTIFY,
-- because every notifying commit takes one cluster-wide lock). Losing it in a crash costs one idle poll.
create unlogged table stepwell.doorbell (
    worker bigint not null,
    queue  text not null,
    until  timestamptz not null,
    primary key (worker, queue)
) with (fillfactor = 50);

-- Who exports the database's metrics, and until when, among supervisors that reach the database through a connection pooler
-- only: who has a session holds a lock in it instead. Losing the row in a crash costs one look.
create unlogged table stepwell.exporter (
    sole   boolean primary key default true check (sole),
    holder bigint not null,
    until  timestamptz not null
);


-- =====================================================================================================
-- 2. Producers
-- =====================================================================================================

-- Ring for the workers that are idle on a queue. Queue 'stepwell' means: any idle worker.
create function stepwell.ring(on_queue text) returns void
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
as $$
begin
    if exists (select from doorbell d
               where (d.queue = on_queue or on_queue = 'stepwell') and d.until > clock_timestamp()) then
        perform pg_notify('stepwell', on_queue);
    end if;
end
$$;

-- What a claimant must know to advance a run of this workflow.
create function stepwell.claimed_as(workflow text, version text) returns text
    language sql immutable parallel safe
as $$
    select case when version = '' then workflow else workflow || '@' || version end
$$;

-- The version of a workflow that new runs get: the one published last of those that a live worker has. In a rolling
-- deploy an old worker may start once more after the first new one: nobody would take these runs when it is gone. Null:
-- nobody has published it.
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

-- Refuse what is no W3C trace context: a traceparent, and behind a space a tracestate if there is one. A function of its
-- own, called where there is one to check.
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

-- Enqueue one run for each input, in the caller's transaction; answers in the order of the inputs.
-- A key that is known already gives the id of its first run and created = false, and its input is
-- ignored. Without a version it is the current one, without a queue the one that the workers have published. Keys are
-- inserted in sorted order, so that two callers cannot deadlock; a READ COMMITTED caller never sees an error for a
-- conflict, stricter levels may see 40001. `trace` is the W3C context in which this is done: the runs go on with its trace.
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

-- Enqueue one run; the id of the run, or of the first run of this key.
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

-- Ask for the end of a run: inserts a wake task, which a worker applies. A run that waits or is pending
-- ends at once, one that a worker executes at its next step. It is meant for this epoch: a retry that comes
-- before it is applied is not cancelled. Answers whether the run was open.
create function stepwell.cancel(run uuid) returns boolean
    language plpgsql security definer
    set search_path = pg_catalog, stepwell, pg_temp
as $$
declare
    meant int;
begin
    select r.epoch into meant from runs r where r.id = run and r.state = 'open';
    if not found then
        return false;
    end if;
    perform wake(run, 'cancel', json_build_object('epoch', meant));
    return true;
end
$$;

-- Have a worker apply a fact to a run: nobody else may lock its task (I15).
create function stepwell.wake(run uuid, fact text, args json) returns void
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
as $$
begin
    insert into tasks (run_id, kind, name, queue, priority, fresh, args)
    values (run, 'wake', fact, 'stepwell', 0, false, args);
    perform ring('stepwell');
end
$$;

-- Send a signal to a run. It is kept until the run takes it, by wait_signal, in the order in which signals of
-- that name came; each is taken once. Answers whether the run was open. `trace` is the W3C context in which it is sent:
-- who takes it links to that.
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

-- The records of a run that apply, those of failures among them, and the openings of its epochs: all but what a rewind,
-- a fresh start or the retry of a cancelled run has voided. `visible` in worker/replay/records.py says the same, and
-- what a retry makes of failures.
create function stepwell.standing(run uuid) returns setof stepwell.outbox
    language plpgsql stable
    set search_path = pg_catalog, stepwell, pg_temp
    set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
#variable_conflict use_column
declare
    opening    outbox;
    to_path    int[];
    first_void int;
    voided     int4multirange := '{}';
begin
    for opening in select * from outbox o where o.run_id = standing.run and o.kind = 'epoch' order by o.seq loop
        first_void := null;
        if opening.outcome = 'continue' then
            first_void := 0;
        elsif opening.outcome = 'rewind' then
            to_path := array(select p::int from json_array_elements_text(opening.value -> 'to') p);
            select min(o.seq) into first_void from outbox o
            where o.run_id = standing.run and o.seq < opening.seq and o.kind not in ('run', 'epoch')
              and not voided @> o.seq and o.path[1:cardinality(to_path)] = to_path;
        elsif opening.outcome in ('retry', 'resolve') then
            select min(o.seq) filter (where o.kind = 'cancel') into first_void from outbox o
            where o.run_id = standing.run and o.seq < opening.seq and not voided @> o.seq
            having not coalesce(bool_or(o.kind = 'step' and o.path[cardinality(o.path)] = 0), false);
        end if;
        if first_void is not null then
            voided := voided + int4multirange(int4range(first_void, opening.seq));
        end if;
        if opening.outcome = 'resolve' then     -- what was said of that step before
            to_path := array(select p::int from json_array_elements_text(opening.value -> 'at') p);
            select voided + coalesce(range_agg(int4range(o.seq, o.seq + 1)), '{}') into voided from outbox o
            where o.run_id = standing.run and o.seq < opening.seq and o.path = to_path
              and o.kind = 'step' and o.n = 0 and o.outcome = 'completed';
        end if;
    end loop;
    return query
        select * from outbox o
        where o.run_id = standing.run and o.kind <> 'run' and not voided @> o.seq order by o.seq;
end
$$;

-- The path of the first step of a run that was undone, by a record that applies; null: none was.
create function stepwell.undone(run uuid) returns int[]
    language plpgsql stable
    set search_path = pg_catalog, stepwell, pg_temp
    set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
begin
    if not exists (select from outbox o
                   where o.run_id = undone.run and o.kind = 'step' and o.n = 0 and o.outcome = 'completed'
                     and o.path[cardinality(o.path)] = 0) then
        return null;
    end if;
    return (
        select s.path
        from standing(undone.run) u
        join standing(undone.run) s on s.path = u.path[1:cardinality(u.path) - 1] and s.kind = 'step' and s.n = 0
        where u.kind = 'step' and u.n = 0 and u.outcome = 'completed' and u.path[cardinality(u.path)] = 0
        order by s.seq limit 1);
end
$$;

-- Whether the call at a path is the one at another, or below it, or one that the same course of the body makes later.
create function stepwell.at_or_after(path int[], other int[]) returns boolean
    language sql immutable parallel safe
as $$
    select cardinality(other) = 0
           or path[1:cardinality(other) - 1] = other[1:cardinality(other) - 1]
              and path[cardinality(other)] >= other[cardinality(other)]
$$;

-- Open an ended run again, in a new epoch, with a task. The run is locked, and has no task. Answers the epoch.
create function stepwell.reopen(run uuid, how text, said json default null) returns int
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
declare
    r        runs;
    last_seq int;
    opened   timestamptz;
    moment   constant timestamptz := clock_timestamp();
begin
    select * into r from runs where id = run;
    select coalesce(max(seq), 0) + 1, coalesce(max(at) filter (where kind = 'epoch'), r.created_at)
    into last_seq, opened from outbox where run_id = run;
    insert into outbox (run_id, epoch, path, n, seq, kind, name, outcome, value, at)
    values (run, r.epoch + 1, '{}', 1, last_seq, 'epoch', r.workflow, how, said, moment);
    -- The deadline counted from enqueue, or from when the epoch before was opened. Who waits for the run was told of
    -- its end, unless it was blocked, and counts it no more.
    update runs
    set state = 'open', epoch = r.epoch + 1, key_epoch = case when how = 'rewind' then r.epoch + 1 else r.key_epoch end,
        finished_at = null, output = null, error = null, deadline_at = moment + (r.deadline_at - opened),
        counted = r.counted and r.state in ('open', 'blocked')
    where id = run;
    insert into tasks (run_id, name, queue, priority, tenant, lane, fresh, seq, signals)
    select run, claimed_as(r.workflow, r.version), r.queue, r.priority, r.tenant, r.lane, false, last_seq,
           (select count(*) from signals s where s.run_id = run);
    perform ring(r.queue);
    return r.epoch + 1;
end
$$;

-- Open a failed, cancelled or blocked run again: what completed stays completed, what failed is tried anew. Answers
-- the new epoch, or null when the run is not in such a state, or has ended and its steps were undone: it would go on
-- from what is not there any more. The row lock on the run makes a second retry at the same moment answer null; no task
-- exists then that a claimant could hold.
create function stepwell.retry(run uuid) returns int
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
declare
    r runs;
begin
    select * into r from runs where id = run and state in ('failed', 'cancelled', 'blocked') for update;
    if not found or r.state <> 'blocked' and undone(run) is not null then
        return null;
    end if;
    perform refuse_forgotten(r);
    return reopen(run, 'retry');
end
$$;

-- Have a run go on from a call as if neither that one nor anything after it had happened. What happened before stays;
-- later calls have other idempotency keys, the signals that they took are there again, and the runs that they made are
-- on their own, cancelled if they are open and not detached. Answers the new epoch, or null for a run that is open and
-- not paused, or of which something is being executed.
create function stepwell.rewind(run uuid, to_path int[]) returns int
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
declare
    t      tasks;
    r      runs;
    cut    outbox;
    gone   int[];
    child  runs;
begin
    select * into t from tasks
    where run_id = run and path = '{}' and kind not in ('wake', 'deliver') for update;
    select * into r from runs where id = run for update;
    if not found or r.state = 'open' and (
            t.paused is not true
            or exists (select from tasks c
                       where c.run_id = run and c.kind not in ('wake', 'deliver') and c.state = 'claimed')) then
        return null;
    end if;
    perform refuse_forgotten(r);
    if to_path is null or 0 >= any (to_path) then
        raise exception 'stepwell: the path of a call is one or more numbers from 1' using errcode = '22023';
    end if;
    select * into cut from standing(run) s
    where s.kind not in ('epoch', 'cancel', 'patch') and at_or_after(s.path, to_path) order by s.seq limit 1;
    if not found and cardinality(to_path) > 0 then
        raise exception 'stepwell: run % has nothing recorded at % or after it', run, array_to_string(to_path, '.')
            using errcode = '55000';
    end if;
    gone := undone(run);
    if exists (select from standing(run) s where s.path = gone and s.seq < cut.seq) then
        raise exception 'stepwell: the step at % was undone when run % ended: rewind to % or before',
            array_to_string(gone, '.'), run, array_to_string(gone, '.') using errcode = '55000';
    end if;

    -- Before what has come since: ids below all that were drawn, the last of these signals first.
    insert into signals (id, run_id, name, payload, at) overriding system value
    select -nextval('stepwell.signals_id_seq'), run, b.name, coalesce(b.value, 'null'), b.at
    from (select * from standing(run) s
          where s.kind = 'signal' and s.outcome = 'completed' and s.seq >= cut.seq order by s.seq desc) b;

    -- In other branches it is the time that tells whether a child was made after that point.
    for child in
        select * from runs c
        where c.parent_id = run and c.parent_path is not null
          and (at_or_after(c.parent_path, to_path)
               or c.created_at > cut.at and c.parent_path[1] >= to_path[1])
    loop
        update runs c set parent_path = null where c.id = child.id;
        delete from signals s
        where s.run_id = run and s.name = 'stepwell:child:' || array_to_string(child.parent_path, '.');
        if child.state = 'open' and not child.detached then
            perform wake(child.id, 'cancel', json_build_object('epoch', child.epoch));
        end if;
    end loop;

    -- Nor is the result taken of a child that the run had dropped.
    delete from signals s
    where s.run_id = run and s.name like 'stepwell:child:%'
      and at_or_after(string_to_array(substr(s.name, length('stepwell:child:') + 1), '.')::int[], to_path);

    delete from tasks c where c.run_id = run and c.kind not in ('wake', 'deliver');
    -- A call that only began something has no record: then the first one after it says where.
    return reopen(run, 'rewind', json_build_object('to', coalesce(cut.path[1:cardinality(to_path)], '{}')));
end
$$;

-- Whether something is recorded at a path or after it in the same course of the body, or at the call before.
create function stepwell.has_come_to(run uuid, at_path int[]) returns boolean
    language sql stable
    set search_path = pg_catalog, stepwell, pg_temp
    set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
    with before (path) as (
        select case when cardinality(at_path) % 2 = 0 then at_path      -- a branch
                    when at_path[cardinality(at_path)] > 1
                    then at_path[1:cardinality(at_path) - 1] || (at_path[cardinality(at_path)] - 1)
                    else at_path[1:cardinality(at_path) - 2] end)
    select before.path = '{}'
           or exists (select from stepwell.runs c where c.parent_id = run and c.parent_path = before.path)
           or exists (
               select from stepwell.standing(run) s
               where s.kind not in ('epoch', 'cancel', 'patch')
                 and (stepwell.at_or_after(s.path, at_path) or s.path[1:cardinality(before.path)] = before.path))
    from before
$$;

-- Make a new run with what happened in another one before a call, and have it go on from there: with the same input and
-- version, or others. It draws the same numbers, its steps have idempotency keys of their own. The other run may be in
-- any state, and is left as it is. Answers the id, or null for an unknown run.
create function stepwell.fork(run uuid, from_path int[], input json default null, version text default null)
returns uuid
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
#variable_conflict use_column
declare
    r        runs;
    made     constant uuid := new_id();
    moment   constant timestamptz := clock_timestamp();
    -- Fingerprints are veiled by the key of the input.
    sealed_with constant text := '^{"stepwell:sealed": ?{"k": ?"([A-Za-z0-9._-]+)"';
    veiled_alike constant boolean := fork.input is null or coalesce((
        select substring(x.input::text from sealed_with) is not distinct from substring(fork.input::text from sealed_with)
        from runs x where x.id = fork.run), true);
    cut      int;
    last_seq int;
    opened   timestamptz;
begin
    select * into r from runs x where x.id = fork.run for key share;    -- who forgets it waits, and finds the fork
    if not found then
        return null;
    end if;
    perform refuse_forgotten(r);
    if coalesce(json_typeof(fork.input), 'object') <> 'object' then
        raise exception 'stepwell: the input of a run must be a JSON object, parameter name to value'
            using errcode = '22023', hint = 'for one parameter "lead": {"lead": ...}';
    end if;
    if octet_length(fork.version) > 255 then
        raise exception 'stepwell: the version has at most 255 bytes' using errcode = '22023';
    end if;
    if from_path is null or 0 >= any (from_path) then
        raise exception 'stepwell: the path of a call is one or more numbers from 1' using errcode = '22023';
    end if;
    select min(s.seq) filter (where s.kind not in ('epoch', 'patch') and at_or_after(s.path, from_path)
                                 or s.kind = 'cancel' or s.kind = 'step' and s.path[cardinality(s.path)] = 0)
    into cut from standing(fork.run) s;
    if not has_come_to(fork.run, from_path) then
        raise exception 'stepwell: run % has not come to call %', fork.run, array_to_string(from_path, '.')
            using errcode = '55000';
    end if;

    insert into outbox (run_id, epoch, path, n, seq, kind, name, fingerprint, outcome, value, error, worker, at)
    select made, o.epoch, o.path, o.n, o.seq, o.kind, o.name, case when veiled_alike then o.fingerprint end, o.outcome,
           o.value, o.error, o.worker, o.at
    from outbox o
    where o.run_id = fork.run and o.epoch >= r.base_epoch and o.kind <> 'run' and (cut is null or o.seq < cut);
    select coalesce(max(o.seq), 0) + 1, coalesce(max(o.epoch), r.base_epoch) + 1,
           coalesce(max(o.epoch) filter (where o.outcome in ('rewind', 'continue')), r.base_epoch)
    into last_seq, r.epoch, r.key_epoch from outbox o where o.run_id = made;
    insert into outbox (run_id, epoch, path, n, seq, kind, name, outcome, value, at)
    values (made, r.epoch, '{}', 1, last_seq, 'epoch', r.workflow, 'fork',
            json_build_object('of', fork.run, 'from', from_path), moment);

    -- Where a body has its time from before the first record: so it is that of the other run.
    select coalesce(max(o.at) filter (where o.kind = 'epoch'), r.created_at) into opened
    from outbox o where o.run_id = fork.run;
    insert into runs (id, workflow, version, queue, priority, tenant, lane, labels, input, deadline_at, trace,
                      seed, epoch, base_epoch, key_epoch, created_at)
    values (made, r.workflow, coalesce(fork.version, r.version), r.queue, r.priority, r.tenant, r.lane, r.labels,
            coalesce(fork.input, r.input), moment + (r.deadline_at - opened), r.trace,
            coalesce(r.seed, r.id), r.epoch, r.base_epoch, r.key_epoch, r.created_at);
    insert into tasks (run_id, name, queue, priority, tenant, lane, fresh, seq, due_at)
    values (made, claimed_as(r.workflow, coalesce(fork.version, r.version)), r.queue, r.priority, r.tenant, r.lane, false,
            last_seq, moment);
    perform ring(r.queue);
    return made;
end
$$;

-- Say for a step how it ended, where nobody knows but a person: with a value or an error {"type", "message"}. For a
-- blocked or failed run, which goes on as by a retry. What was said of a step is no execution (no worker has recorded it):
-- as long as the run has not gone on from there it can be said otherwise, in an epoch that voids it. Answers the new
-- epoch, or null for a run in another state or one whose steps were undone.
create function stepwell.resolve(run uuid, at_path int[], value json default null, error json default null)
returns int
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
declare
    r      runs;
    known  outbox;
    anew   boolean;
    opened int;
    place  constant text := array_to_string(at_path, '.');
begin
    if (resolve.value is null) = (resolve.error is null) then
        raise exception 'stepwell: a step is resolved by a value or by an error' using errcode = '22023';
    end if;
    if resolve.error is not null and (
            json_typeof(resolve.error) <> 'object'
            or json_typeof(resolve.error -> 'type') is distinct from 'string'
            or json_typeof(resolve.error -> 'message') is distinct from 'string') then
        raise exception 'stepwell: the error of a step is an object with the texts "type" and "message"'
            using errcode = '22023';
    end if;
    -- Workers read it with the rest of the history, before they know whose it is; text that jsonb refuses, so would they.
    if jsonb_path_exists(resolve.error::jsonb, 'strict $.**{99}')
       or jsonb_path_exists(resolve.error::jsonb, '$.** ? (@.type() == "number" && @.abs() > 1e308)') then
        raise exception 'stepwell: the error of a step is nested 98 levels deep at most, without numbers above 1e308'
            using errcode = '22023';
    end if;
    select * into r from runs x where x.id = resolve.run and x.state in ('failed', 'blocked') for update;
    if not found or r.state = 'failed' and undone(resolve.run) is not null then
        return null;
    end if;
    perform refuse_forgotten(r);
    select * into known from standing(resolve.run) s
    where s.path = at_path and s.kind = 'step' order by s.seq desc limit 1;
    if not found then
        raise exception 'stepwell: run % has no execution of a step at %', resolve.run, coalesce(place, '?')
            using errcode = '55000';
    end if;
    anew := known.n = 0 and known.outcome = 'completed';
    if anew and known.worker is not null then
        raise exception 'stepwell: step % at % has completed', known.name, place
            using errcode = '55000', hint = 'rewind to it to have it executed again';
    end if;
    if known.path[cardinality(known.path)] > 0 and (
            exists (select from standing(resolve.run) s
                    where s.kind not in ('epoch', 'cancel', 'patch') and (s.n > 0 or s.outcome <> 'failed')
                      and comes_after(s.path, at_path))
            or anew and exists (select from runs c where c.parent_id = resolve.run and comes_after(c.parent_path, at_path)))
    then
        raise exception 'stepwell: the run has gone on since step % at % %', known.name, place,
            case when anew then 'was resolved' else 'failed' end
            using errcode = '55000', hint = 'rewind to it to have it executed again';
    end if;
    opened := case when anew then reopen(resolve.run, 'resolve', json_build_object('at', at_path))
                   else reopen(resolve.run, 'retry') end;
    insert into outbox (run_id, epoch, path, n, seq, kind, name, fingerprint, outcome, value, error)
    select resolve.run, opened, at_path, 0, t.seq + 1, 'step', known.name, known.fingerprint,
           case when resolve.error is null then 'completed' else 'failed' end, resolve.value, resolve.error
    from tasks t where t.run_id = resolve.run and t.path = '{}' and t.kind not in ('wake', 'deliver');
    update tasks t set seq = t.seq + 1
    where t.run_id = resolve.run and t.path = '{}' and t.kind not in ('wake', 'deliver');
    return opened;
end
$$;

-- Whether a body can have made the call at a path only after the one at another was answered: odd positions of a path
-- number calls, even ones branches, which do not wait for each other.
create function stepwell.comes_after(path int[], other int[]) returns boolean
    language sql immutable parallel safe
as $$
    select coalesce((
        select u.i % 2 = 1 and u.a > u.b
        from unnest(path, other) with ordinality u (a, b, i)
        where u.a <> u.b order by u.i limit 1), false)
$$;

-- Stop runs until they are resumed: nothing of them is claimed any more, and what is being executed ends first. What
-- wakes them meanwhile is found when they are resumed. Their children go on. Answers the runs that are open, and paused
-- now.
--
-- Tasks of runs are locked in the order of a flush, and those of calls after them. What waits for no time (a step that
-- a person has to look at, one that its window holds back) is not claimed anyway, and stays as it is.
create function stepwell.pause_many(runs uuid[]) returns uuid[]
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
declare
    found_ids bigint[];
    stopped   uuid[];
begin
    select array_agg(f.id), array_agg(f.run_id) into found_ids, stopped
    from (select t.id, t.run_id from tasks t
          where t.run_id = any (runs) and t.path = '{}' and t.kind not in ('wake', 'deliver')
          order by t.id for update) f;
    update tasks t
    set paused = true, state = case when t.state = 'claimed' then t.state else 'paused' end
    where t.id = any (found_ids) and not t.paused;
    update tasks t
    set paused = true,
        state = case when t.state = 'claimed' or t.state = 'waiting' and t.due_at is null then t.state else 'paused' end
    where t.run_id = any (stopped) and t.path > '{}' and t.kind not in ('wake', 'deliver') and not t.paused;
    return coalesce(stopped, '{}');
end
$$;

create function stepwell.pause(run uuid) returns boolean
    language sql
    set search_path = pg_catalog, stepwell, pg_temp
as $$
    select cardinality(stepwell.pause_many(array[run])) > 0
$$;

-- Have paused runs go on. A run becomes ready, whatever it waited for: driven, it finds what has come, or waits again for
-- the rest of the time. Only one that was not to start yet goes on waiting. Answers the runs that were paused.
create function stepwell.resume_many(runs uuid[]) returns uuid[]
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
declare
    found_ids bigint[];
    resumed   uuid[];
begin
    select array_agg(f.id), array_agg(f.run_id) into found_ids, resumed
    from (select t.id, t.run_id from tasks t
          where t.run_id = any (runs) and t.path = '{}' and t.kind not in ('wake', 'deliver') and t.paused
          order by t.id for update) f;
    update tasks t
    set paused = false,
        state = case when t.state <> 'paused' then t.state
                     when t.attempt = 0 and t.due_at > clock_timestamp() then 'waiting'
                     when t.interruptions >= 2 then 'suspect' else 'ready' end,
        turn = nextval('stepwell.turns')
    where t.id = any (found_ids);
    perform resume_calls(resumed);
    perform ring(q.queue) from (select distinct t.queue from tasks t where t.id = any (found_ids)) q;
    return coalesce(resumed, '{}');
end
$$;

create function stepwell.resume(run uuid) returns boolean
    language sql
    set search_path = pg_catalog, stepwell, pg_temp
as $$
    select cardinality(stepwell.resume_many(array[run])) > 0
$$;

-- The calls of runs whose tasks are locked are not paused any more: each waits for its time, or is ready.
create function stepwell.resume_calls(of_runs uuid[]) returns void
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
declare
    rung text[];
begin
    with resumed as (
        update tasks t
        set paused = false,
            state = case when t.state <> 'paused' then t.state when t.due_at > clock_timestamp() then 'waiting'
                         when t.interruptions >= 2 then 'suspect' else 'ready' end,
            turn = nextval('stepwell.turns')
        where t.run_id = any (of_runs) and t.path > '{}' and t.kind not in ('wake', 'deliver') and t.paused
        returning t.queue, t.state)
    select array_agg(distinct r.queue) into rung from resumed r where r.state = 'ready';
    perform ring(q) from unnest(rung) q;
end
$$;

-- A run whose payloads were erased cannot go on: nothing is there that it could go on from.
create function stepwell.refuse_forgotten(r stepwell.runs) returns void
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
as $$
begin
    if r.forgotten_at is not null then
        raise exception 'stepwell: run % was forgotten: nothing is left that it could go on from', r.id
            using errcode = '55000';
    end if;
end
$$;

-- Everything that holds a copy of what came in under a key: the runs that were enqueued under it, what these have called,
-- and the forks of any of them. Without a workflow, the key of each.
create function stepwell.family_of(key text, workflow text default null) returns setof uuid
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
#variable_conflict use_column
declare
    family uuid[] := '{}';
    latest uuid[];
begin
    -- One look-up for each workflow that has keys: there is no index on keys alone.
    with recursive named (workflow) as (
        (select k.workflow from keys k order by k.workflow limit 1)
        union all
        select (select k.workflow from keys k where k.workflow > n.workflow order by k.workflow limit 1)
        from named n where n.workflow is not null)
    select array_agg(k.run_id) into latest
    from named n join keys k on k.workflow = n.workflow and k.key = family_of.key
    where family_of.workflow is null or n.workflow = family_of.workflow;
    while cardinality(latest) > 0 loop
        family := family || latest;
        latest := array(
            select c.id from runs c where c.parent_id = any (latest) and c.parent_path is not null
            union
            select c.id from runs c where c.parent_id = any (latest) and c.parent_path is null
            union
            select o.run_id from outbox o
            where o.kind = 'epoch' and o.outcome = 'fork' and o.value ->> 'of' = any (latest::text[])
            except
            select f from unnest(family) f);
    end loop;
    return query select f from unnest(family) f order by f;
end
$$;

create function stepwell.forgotten_fault(error json) returns json
    language sql immutable parallel safe
as $$
    select json_strip_nulls(json_build_object(
        'type', error ->> 'type', 'message', 'forgotten', 'reason', error ->> 'reason'))
    where error is not null
$$;

-- Erase what came in under a key, and what was made of it: the payloads of its family (see family_of), the key itself,
-- labels, lane and tenant. What happened stays: names, outcomes, times. The key may be used again then, for a new run.
-- Answers the runs; raises 55000 if one of them is open, or was called by a run that is not among them and so holds its result.
--
-- Each run is locked, until no more are found: one that has ended calls nothing, and a fork of it has to wait. A blocked
-- one, which could never go on, is cancelled.
create function stepwell.forget(key text, workflow text default null) returns uuid[]
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
#variable_conflict use_column
declare
    marker constant json := '{"stepwell:forgotten":true}';
    family uuid[] := '{}';
    found_now uuid[];
    r      runs;
begin
    loop
        found_now := array(select f from family_of(forget.key, forget.workflow) f);
        exit when found_now <@ family;
        perform 1 from runs x where x.id = any (found_now) order by x.id for update;
        family := found_now;
    end loop;
    for r in select * from runs x where x.id = any (family) order by x.id loop
        if r.state = 'open' then
            raise exception 'stepwell: run % is open: it can be forgotten when it has ended', r.id using errcode = '55000';
        end if;
        if r.parent_id is not null and not r.parent_id = any (family) then
            raise exception 'stepwell: run % was called by run %, which holds its result: forget that one by its key',
                r.id, r.parent_id using errcode = '55000';
        end if;
        if r.state = 'blocked' then
            perform reopen(r.id, 'retry');
            perform end_v1(null, array(
                select t.id from tasks t
                where t.run_id = r.id and t.path = '{}' and t.kind not in ('wake', 'deliver')), 'cancelled', null);
        end if;
    end loop;

    delete from keys k using runs x
    where x.id = any (family) and k.workflow = x.workflow and k.key = x.key and k.run_id = x.id;
    update runs x
    set input = marker, output = case when x.output is not null then marker end, error = forgotten_fault(x.error),
        key = null, labels = null, lane = null, tenant = null, forgotten_at = clock_timestamp()
    where x.id = any (family);
    -- What was said when an epoch was opened is where from; of a fresh start it is the input.
    update outbox o
    set value = case when o.value is null or o.kind = 'epoch' and o.outcome <> 'continue' then o.value else marker end,
        error = forgotten_fault(o.error), fingerprint = null
    where o.run_id = any (family);
    delete from signals s where s.run_id = any (family);
    delete from state s where s.run_id = any (family);
    delete from stream s where s.run_id = any (family);
    delete from tasks t where t.run_id = any (family) and t.kind not in ('wake', 'deliver');
    delete from tasks t                                        -- what would be told to a run that has ended
    where t.state = 'ready' and t.queue = 'stepwell' and t.run_id = any (family) and t.kind = 'wake';
    -- A signal whose transaction is still open cannot be seen here. If it commits before this one does, nobody knows yet
    -- that the run was forgotten when its own wake is applied; this one is applied after both.
    perform wake(f, 'forget', '{}') from unnest(family) f;
    return family;
end
$$;

-- A run as people mean it. running = a task of it is claimed, paused, pending = never claimed, else waiting.
create view stepwell.run_status as
select r.id, r.workflow, r.version, r.queue, r.priority, r.labels, r.epoch, r.parent_id,
       case when r.state <> 'open' then r.state
            when t.state = 'claimed' then 'running'
            when t.driven >= 0 and exists (
                select from stepwell.tasks s
                where s.run_id = r.id and s.kind not in ('wake', 'deliver') and s.state = 'claimed') then 'running'
            when t.paused then 'paused'
            when t.attempt = 0 and t.fresh then 'pending'
            else 'waiting' end as status,
       r.created_at, coalesce(r.started_at, t.started_at) as started_at, r.finished_at, r.deadline_at,
       t.id as task, t.state as task_state, t.due_at, t.attempt, t.doing, t.interruptions, t.cancelling, t.claimed_by
from stepwell.runs r
left join stepwell.tasks t on t.run_id = r.id and t.kind = 'run' and t.path = '{}';


-- The workers whose supervisor holds their advisory lock: that on the worker's id, in a session of somebody who may be
-- a supervisor. Anybody who may connect can take the lock of any number, and keep a dead worker from being noticed, were
-- he counted. Who may be one: whoever may write to workers, be it as the owner, as a superuser or by a grant, or may
-- become such a role (a login that inherits nothing and takes its role by SET ROLE).
-- A bigint key is shown as classid (high half) and objid (low half), objsubid 1.
create view stepwell.supervised as
with held as materialized (
    select (l.classid::bigint << 32) | l.objid::bigint as worker, a.usesysid as holder
    from pg_catalog.pg_locks l
    join pg_catalog.pg_stat_activity a on a.pid = l.pid
    where l.locktype = 'advisory' and l.objsubid = 1 and l.granted
      and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database()))
select h.worker
from held h
where has_table_privilege(h.holder, 'stepwell.workers'::regclass, 'update')
   or pg_has_role(h.holder, (select n.nspowner from pg_catalog.pg_namespace n where n.nspname = 'stepwell'), 'member')
   or pg_has_role(h.holder, to_regrole('stepwell_worker'), 'member');


-- =====================================================================================================
-- 3. Claimants
-- =====================================================================================================
--
-- Functions, because each statement inside sees a fresh snapshot and the whole costs one round trip. The
-- version in the name lets two releases share a database.
--
-- The tasks swing between none and millions of rows faster than statistics follow, and there is one right plan
-- for each statement, by index. So planner settings are pinned, and no join decides how tasks are found: to a
-- planner that takes the table for nearly empty (a queue that was worked off, vacuumed, and filled again) reading
-- all of it costs no more than one look-up. Tasks and runs are found by `id = any (…)` alone, and what was found
-- is matched with each other, or with the input, by hashing.

-- Make a worker known; it may claim from now on. Tasks that were shelved because nobody knew their name
-- become ready.
create function stepwell.register_v1(
    me bigint, my_supervisor bigint, my_host text, my_pid int, my_release text, my_queues text[], my_names text[])
returns void
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
as $$
begin
    insert into workers (id, supervisor, host, pid, release, queues, names)
    values (me, my_supervisor, my_host, my_pid, my_release, my_queues, my_names)
    on conflict (id) do nothing;                               -- a resend after a lost answer
    perform unshelve_v1(my_queues, my_names, 10000);
end
$$;

-- Ready what was shelved and is known here. Bounded; called again by the caretaker.
create function stepwell.unshelve_v1(my_queues text[], my_names text[], at_most int) returns int
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_sort = off set enable_seqscan = off set enable_bitmapscan = off
    set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    found_ids bigint[];
begin
    select array_agg(f.id) into found_ids
    from (select t.id
          from unnest(my_queues) q cross join unnest(my_names) n
          -- Name by name: asked for all at once, Postgres before 17 may read all that was set aside.
          cross join lateral (
              select t.id from tasks t where t.state = 'shelved' and t.queue = q and t.name = n
              limit at_most for update skip locked) t
          limit at_most) f;
    update tasks t set state = 'ready', turn = nextval('stepwell.turns') where t.id = any (found_ids);
    return coalesce(cardinality(found_ids), 0);
end
$$;

-- Set ready tasks aside that no live worker of the queue knows, so that they do not stand in the way of
-- the others. Looks at the head of each priority only, which is where they would, and locks nothing but
-- what it sets aside: a claim skips what is locked. While nobody lives nothing is in anybody's way.
create function stepwell.shelve_v1(on_queue text, at_most int) returns int
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_sort = off set enable_seqscan = off set enable_bitmapscan = off
    set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    known     text[];
    last      bigint;
    strangers bigint[];
    done      int := 0;
begin
    select coalesce(array_agg(distinct n), '{}') into known
    from workers w, unnest(w.names) n where w.dead_at is null and on_queue = any (w.queues);
    if known = '{}' then
        return 0;
    end if;
    for g in 0..19 loop
        select max(head.turn) into last
        from (select t.turn from tasks t
              where t.state = 'ready' and t.queue = on_queue and t.priority = g / 2 and t.fresh = (g % 2 = 1)
              order by t.turn limit at_most) head;
        select array_agg(s.id) into strangers
        from (select t.id from tasks t
              where t.state = 'ready' and t.queue = on_queue and t.priority = g / 2 and t.fresh = (g % 2 = 1)
                and t.turn <= last and t.name <> all (known)
              for update skip locked) s;
        update tasks t set state = 'shelved' where t.id = any (strangers);
        done := done + coalesce(cardinality(strangers), 0);
    end loop;
    return done;
end
$$;

-- Whether the cancellation of a run, or that its deadline has passed, is recorded.
create function stepwell.noted_cancelled(run uuid, in_epoch int) returns boolean
    language sql stable
    set search_path = pg_catalog, stepwell, pg_temp
    set enable_seqscan = off set enable_bitmapscan = off
as $$
    select exists (
        select from stepwell.outbox o where o.run_id = run and o.epoch = in_epoch and o.path = '{}' and o.n = 2)
$$;

-- Whether a run that was in one epoch is in another one because it has started anew, and for no other reason.
create function stepwell.has_only_continued(run uuid, in_epoch int, to_epoch int) returns boolean
    language sql stable
    set search_path = pg_catalog, stepwell, pg_temp
    set enable_seqscan = off set enable_bitmapscan = off
as $$
    select to_epoch > in_epoch and not exists (
        select from stepwell.outbox o
        where o.run_id = run and o.epoch > in_epoch and o.path = '{}' and o.n = 1 and o.kind = 'epoch'
          and o.outcome <> 'continue')
$$;

-- Whether a run in this epoch is to be cancelled, whoever knows of it yet.
create function stepwell.is_cancelled(run uuid, in_epoch int) returns boolean
    language sql stable
    set search_path = pg_catalog, stepwell, pg_temp
    set enable_seqscan = off set enable_bitmapscan = off
as $$
    select exists (select from stepwell.standing(run) s where s.kind = 'cancel')    -- a retry of its undo keeps it
           or exists (select from stepwell.tasks t
                      where t.run_id = run and t.path = '{}' and t.kind not in ('wake', 'deliver') and t.cancelling)
           or exists (select from stepwell.tasks t
                      where t.state = 'ready' and t.queue = 'stepwell' and t.priority = 0 and not t.fresh
                        and t.run_id = run and t.name = 'cancel' and (t.args ->> 'epoch')::int = in_epoch)
           or exists (select from stepwell.tasks t
                      where t.state = 'claimed' and t.kind = 'wake'
                        and t.run_id = run and t.name = 'cancel' and (t.args ->> 'epoch')::int = in_epoch)
$$;

-- How many bytes a value has as text, without reading it: all are stored as they are, but for one that came compressed
-- from a table of somebody's.
create function stepwell.size_of(value json) returns int
    language sql stable parallel safe
as $$
    select case when pg_column_compression(value) is null then pg_column_size(value) else octet_length(value::text) end
$$;

-- Whether a value is no larger than at_most bytes (null: any), or was when it was sealed, which makes a third more of it
-- and a little. Nearly always without reading it.
create function stepwell.fits(value json, at_most bigint) returns boolean
    language sql stable parallel safe
as $$
    select case when at_most is null or value is null then true
                when pg_column_compression(value) is null and pg_column_size(value) <= at_most then true
                when stepwell.size_of(value) > (at_most + 50) * 4 / 3 + 200 then false
                else octet_length(value::text) <= at_most or starts_with(value::text, '{"stepwell:sealed":') end
$$;

-- Claim up to at_most ready tasks of one queue, and the wakes and timers that are due, for a worker that is alive.
--
-- I3: the worker's own row is locked first; no row, no claim: a dead worker's statement that still sits
--     in a socket buffer finds nothing. The caller sees 'SW003'.
-- I2: at_most is the number of free slots.
-- floors: for each group (priority * 2 + fresh) the turn below which this worker has seen everything
--     claimed: without it one old open transaction makes each claim walk all dead index entries.
-- alone: take one suspect instead. The caller has nothing else in flight.
-- max_input: the input of a run that has more bytes is not read, `oversize` says how many it has: producers may write any.
-- max_passed: the same for what bodies have passed: arguments of steps, inputs of children and of fresh starts.
create function stepwell.claim_v1(
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
    -- By this lock the backend is found while this transaction is open, whatever its session is called: see backends.sql.
    perform pg_try_advisory_xact_lock_shared(-me);
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
    -- What is claimed is begun: that has to be durable.
    if current_setting('synchronous_commit') in ('off', 'local') then
        perform set_config('synchronous_commit', 'on', true);
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

-- Note that this worker is idle on these queues for so many seconds: enqueue rings for it meanwhile.
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

-- One transition of one claimed task, as the claimant sends it.
--   then = move     the claim goes on, at path `doing`
--          park     wait for due_at, or for others; ready at once if something woke it meanwhile
--          release  give it back, ready
--          continue give it back, ready, without a history
--          finish   the run ends: `ends` says how
--          wake     apply this wake task to its run, and delete it
--          done     of a step or timer: it is over, its run is told
--          hold     of a step: it needs a person, its run is told
create type stepwell.transition_v1 as (
    i int,                 -- 1, 2, … within the flush
    task bigint, attempt int, "position" int,
    run_id uuid, epoch int,
    "then" text,
    doing int[],           -- the call that the run is at; of a call that is a task of its own, its path
    records int,           -- how many records belong to it
    delay float8,          -- park: seconds from now, or
    until timestamptz,     -- park: not before
    wakeups int,           -- park: what the claimant knew of
    seen int,              -- the seq of the history that the drive knew
    strict boolean,        -- only if that was all of it: the order of records decides what the body does
    parent bigint,         -- of a step or timer: the run's own task
    awaits text[],         -- park: the signals that are waited for
    took int,              -- how many signals it takes
    asides int,            -- how many of the records say nothing of the order: patches
    cancelled boolean);    -- it has taken note of the cancellation

-- Write down what happened, for many tasks in one transaction. Answers for each transition, in order:
--   0 fenced · 1 applied · 2 already applied before (a resend) · 3 not applied, the history has gone on (strict)
--   plus 4 when the run is to be cancelled, plus 8 when it is to be paused.
--
-- records: what happened, [{i, k, path, n, kind, name, fingerprint, outcome, value, error, at}]: i is the
--          transition that it belongs to, k = 1, 2, … within that
-- ends:    [{i, state, output, error}]
-- extras:  what few transitions have, see spread_v1; null when none of these has it
--
-- 1. lock own, parents' and target task rows in order of id (any other order deadlocks two flushes);
-- 2. test the fence in a new statement, which sees what the lock waited for (I8);
-- 3. append the history, count it; 4. write the task rows; 5. end runs; 6. tell parents; 7. apply wakes.
-- After 1. nothing locks a task row but those of calls whose run's task is locked, and whoever else writes one of
-- these locks that first (a stray that is released does not: a deadlock with it is resent).
create function stepwell.flush_v1(me bigint, transitions json, records json, ends json, extras json default null)
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

-- Part of flush_v1: what a drive spreads beside its own task. `i` is the transition.
--
--   tasks     [{i, kind, path, name, queue, args, delay, until, wakes, held, windowed, released}]
--             calls that become tasks of their own; held ones are readied by their window
--   children  [{i, path, workflow, version, queue, input, counted, detached, deadline, begun, trace}]  runs that it has
--             called, or begun to wait for them later, or never; trace: the context of the call, where the claimant traces
--   dropped   [{i, path}]  nobody waits any more for the calls at and below this path: what nobody has claimed
--             is not executed, what somebody executes is recorded and wakes nobody; runs that were begun go on
--   settled   [{i, path}]  wait again for those of them that somebody executes
--   taken     [{i, signal}]
--   states    [{i, key, value}]
--   emitted   [{i, n, name, value}]
--   stopping  [{i, epoch, reason}]  of a step: its run is to be blocked
--   continued [{i, input}]  the run starts anew
create function stepwell.spread_v1(items stepwell.transition_v1[], verdicts int[], extras json) returns void
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

-- The first path behind everything at and below a path, as arrays are compared.
create function stepwell.beyond(path int[]) returns int[]
    language sql immutable parallel safe
as $$
    select path[1:cardinality(path) - 1] || (path[cardinality(path)] + 1)
$$;

-- Part of spread_v1: nobody waits any more for the calls at and below a path.
create function stepwell.drop_calls_v1(of_task bigint, of_run uuid, at_path int[]) returns void
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
#variable_conflict use_column
declare
    child    runs;
    gone     bigint[];
    executed bigint[];
    counted  int;
begin
    -- Locked before it is looked at: a claim under way decides which of the two a call is.
    select array_agg(c.id) filter (where c.claimed_by is null or c.kind <> 'step'),
           array_agg(c.id) filter (where c.claimed_by is not null and c.kind = 'step'),
           count(*) filter (where c.wakes in (1, 2))
    into gone, executed, counted
    from (select t.id, t.kind, t.claimed_by, t.wakes from tasks t
          where t.run_id = of_run and t.kind not in ('wake', 'deliver') and t.path >= at_path and t.path < beyond(at_path)
            and t.path <> '{}'
          order by t.id for update) c;
    delete from tasks t where t.id = any (gone);
    update tasks t set wakes = 0 where t.id = any (executed);
    update tasks t set pending = greatest(0, t.pending - counted) where t.id = of_task;
    for child in
        select r.* from runs r
        where r.parent_id = of_run and r.parent_path is not null and r.parent_path >= at_path
          and r.parent_path < beyond(at_path) and not r.begun  -- somebody may still have its handle
        order by r.id for update                               -- one that is just ending will be counted down by its wake
    loop
        update runs r set parent_path = null where r.id = child.id;
        -- Whoever calls it once more, after a retry, makes another one. Only what has succeeded has so for good. The run's
        -- signals are not counted anew: this very flush may take the one that is deleted, and one too many is only read for.
        delete from signals s
        where s.run_id = of_run and s.name = 'stepwell:child:' || array_to_string(child.parent_path, '.')
          and s.payload ->> 'state' <> 'succeeded';
        if child.counted and child.state in ('open', 'blocked') then
            update tasks t set pending = greatest(0, t.pending - 1) where t.id = of_task;
        end if;
        if child.state = 'open' and not child.detached then
            perform wake(child.id, 'cancel', json_build_object('epoch', child.epoch));
        end if;
    end loop;
end
$$;

-- Part of spread_v1: begin a new epoch of a run with another input, and without the history before it.
create function stepwell.continue_v1(of_task bigint, recorded int, input json) returns void
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
    t tasks;
    r runs;
begin
    select * into t from tasks where id = of_task;
    update runs
    set epoch = epoch + 1, base_epoch = epoch + 1, key_epoch = epoch + 1, input = continue_v1.input, seed = new_id()
    where id = t.run_id returning * into r;
    insert into outbox (run_id, epoch, path, n, seq, kind, name, outcome, value)
    values (r.id, r.epoch, '{}', 1, t.seq + recorded + 1, 'epoch', r.workflow, 'continue', r.input);
    delete from tasks c where c.run_id = r.id and c.kind not in ('wake', 'deliver') and c.path > '{}';
    -- After this, whatever ends has nobody to tell; what has ended is not the result of a call to come.
    update runs c set parent_path = null where c.parent_id = r.id and c.parent_path is not null;
    delete from signals s where s.run_id = r.id and s.name like 'stepwell:child:%';
end
$$;

-- Part of spread_v1: make the run that a call of a workflow is. One that was made before, in an earlier epoch, is
-- opened again if it did not succeed, for the parent was retried because of that. One that still cleans up after the
-- cancellation of its parent, or is blocked in that, does so by itself, and another one is made.
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

-- Tell the runs that wait for these what has become of them, if they have ended.
create function stepwell.report_v1(ended uuid[]) returns void
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
as $$
#variable_conflict use_column
declare
    r runs;
    as_signal text;
begin
    for r in
        select c.* from runs c
        where c.id = any (ended) and c.parent_path is not null and c.state in ('succeeded', 'failed', 'cancelled')
    loop
        as_signal := 'stepwell:child:' || array_to_string(r.parent_path, '.');
        insert into signals (run_id, name, payload)
        values (r.parent_id, as_signal,
                json_build_object('run', r.id, 'state', r.state, 'output', r.output, 'error', r.error));
        perform wake(r.parent_id, 'signal', json_build_object(
            'name', as_signal, 'counted', r.counted, 'failed', r.state <> 'succeeded',
            'parent_epoch', (select p.epoch from runs p where p.id = r.parent_id)));
    end loop;
end
$$;

-- These runs have ended: what is left of them is not executed any more, and their parents are told.
create function stepwell.end_families_v1(ended uuid[]) returns void
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
#variable_conflict use_column
begin
    delete from tasks t where t.run_id = any (ended) and t.kind not in ('wake', 'deliver');
    perform report_v1(ended);
end
$$;

create function stepwell.cancel_children_v1(parents uuid[]) returns void
    language sql
    set search_path = pg_catalog, stepwell, pg_temp
as $$
    select stepwell.wake(r.id, 'cancel', json_build_object('epoch', r.epoch))
    from stepwell.runs r
    where r.parent_id = any (parents) and r.parent_path is not null and r.state = 'open' and not r.detached
$$;

-- Part of flush_v1: the transitions of steps and timers, which are tasks of their own. Their records are numbered
-- under the lock of their run's task, which is told of what is done: see tasks.wakes.
create function stepwell.settle_v1(me bigint, items stepwell.transition_v1[], verdicts int[], records json) returns void
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_seqscan = off set enable_bitmapscan = off
    set enable_nestloop = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
    locking constant bigint[] := array(
        select x.parent from unnest(items) x where x.parent is not null and verdicts[x.i] % 4 = 1);
    own     constant bigint[] := array(
        select x.task from unnest(items) x where x.parent is not null and verdicts[x.i] % 4 = 1);
    rung    text[];
begin
    with written as (
        insert into outbox (run_id, epoch, path, n, seq, kind, name, fingerprint, outcome, value, error, worker, at)
        select x.run_id, x.epoch, r.path, r.n, p.seq + row_number() over (partition by x.parent order by r.i, r.k),
               r.kind, r.name, r.fingerprint, r.outcome, r.value, r.error, me, r.at
        from json_to_recordset(records) as r (
                i int, k int, path int[], n int, kind text, name text, fingerprint bigint, outcome text,
                value json, error json, at timestamptz)
        join unnest(items) x on x.i = r.i
        join tasks p on p.id = any (locking) and p.id = x.parent
        where verdicts[r.i] % 4 = 1 and x.parent is not null
        returning kind, name, outcome)
    insert into counters as c (shard, kind, name, outcome, value)
    select pg_backend_pid() % 64, w.kind, w.name, w.outcome, count(*)
    from written w where w.kind = 'step'
    group by w.kind, w.name, w.outcome order by w.kind, w.name, w.outcome
    on conflict (shard, kind, name, outcome) do update set value = c.value + excluded.value;

    if exists (select from tasks t where t.id = any (own) and t.windowed) then
        perform release_next_v1(array(
            select x.task from unnest(items) x
            where x.parent is not null and x.then in ('done', 'hold') and verdicts[x.i] % 4 = 1));
    end if;

    -- The failure of a call wakes at once where its join gives up then; that it is the run's own last word, and not
    -- one of the executions before it, is said by n = 0.
    with told as (
        update tasks p
        set seq = p.seq + d.records,
            pending = greatest(0, p.pending - d.counted),
            wakeups = p.wakeups + (d.always or p.pending <= d.counted and d.counted > 0)::int,
            state = case when p.state <> 'waiting' or not (d.always or p.pending <= d.counted and d.counted > 0) then p.state
                         when p.interruptions >= 2 then 'suspect' else 'ready' end,
            fresh = p.fresh and not (d.always or p.pending <= d.counted and d.counted > 0),
            turn = case when p.state = 'waiting' and (d.always or p.pending <= d.counted and d.counted > 0)
                        then nextval('stepwell.turns') else p.turn end
        from (select x.parent, sum(x.records)::int as records,
                     count(*) filter (where x.then in ('done', 'hold') and t.wakes in (1, 2))::int as counted,
                     coalesce(bool_or(x.then in ('done', 'hold')
                              and (t.wakes = 3 or t.wakes = 2 and (x.then = 'hold' or f.i is not null))), false) as always
              from unnest(items) x
              join tasks t on t.id = any (own) and t.id = x.task
              left join (select distinct r.i from json_to_recordset(records) as r (i int, n int, outcome text)
                         where r.n = 0 and r.outcome = 'failed') f on f.i = x.i
              where x.parent is not null and verdicts[x.i] % 4 = 1
              group by x.parent) d
        where p.id = any (locking) and p.id = d.parent
        returning p.queue, p.state)
    select array_agg(distinct told.queue) into rung from told where told.state = 'ready';
    perform ring(q) from unnest(rung) q;

    update tasks t
    set position = t.position + 1,
        interrupted = t.interrupted and x.then = 'release',
        interruptions = case when x.then = 'release' then t.interruptions else 0 end,
        solo_deaths = case when x.then = 'release' then t.solo_deaths else 0 end,
        claimed_by = case when x.then = 'move' then me end,
        state = case when x.then = 'move' then 'claimed' when x.then = 'hold' then 'waiting'
                     when t.paused then 'paused' when x.then = 'park' then 'waiting'
                     when t.interruptions >= 2 then 'suspect' else 'ready' end,
        turn = case when x.then = 'move' then t.turn else nextval('stepwell.turns') end,
        -- What needs a person is not counted any more, also if its run drops it.
        wakes = case when x.then = 'hold' and t.wakes <> 0 then 3 else t.wakes end,
        due_at = case when x.then = 'release' then t.due_at
                      when x.then = 'park' then coalesce(x.until, clock_timestamp() + make_interval(secs => x.delay)) end
    from unnest(items) x
    where t.id = any (own) and t.id = x.task and verdicts[x.i] % 4 = 1 and x.then in ('move', 'park', 'release', 'hold');

    -- Nor does a person have to look at what nobody waits for.
    delete from tasks t
    using unnest(items) x
    where t.id = any (own) and t.id = x.task and verdicts[x.i] % 4 = 1
      and (x.then = 'done' or x.then = 'hold' and t.wakes = 0);
end
$$;

-- Part of settle_v1: ready as many further items of a window as were done. The run's task is locked. After a retry not
-- every number has a task: what is recorded was done before.
create function stepwell.release_next_v1(done bigint[]) returns void
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
as $$
#variable_conflict use_column
declare
    w    record;
    last int;
    item tasks;
begin
    for w in
        select t.run_id, t.path[1:cardinality(t.path) - 2] as path, count(*)::int as count
        from tasks t where t.id = any (done) and t.windowed group by 1, 2
    loop
        select t.position into last from tasks t
        where t.run_id = w.run_id and t.path = w.path and t.kind not in ('wake', 'deliver') and t.kind = 'window';
        continue when not found;
        -- One by one: to find several at once the planner reads all items of the run.
        for k in 1 .. w.count loop
            select * into item from tasks t
            where t.run_id = w.run_id and t.path >= w.path || (last + 1) and t.path < beyond(w.path)
              and t.kind not in ('wake', 'deliver') and t.kind = 'step' and t.state = 'waiting' and t.attempt = 0
            order by t.run_id, t.path limit 1;
            exit when not found;
            last := item.path[cardinality(item.path) - 1];
            update tasks t
            set state = case when t.paused then 'paused' else 'ready' end, turn = nextval('stepwell.turns')
            where t.id = item.id;
            perform ring(item.queue);
        end loop;
        update tasks t set position = last
        where t.run_id = w.run_id and t.path = w.path and t.kind not in ('wake', 'deliver') and t.kind = 'window';
    end loop;
end
$$;

-- Part of flush_v1: the transitions of which the history holds a record as this worker wrote it, at that moment: one
-- of the same call that a later claim of this worker wrote is not a resend. One pass over the records: asked for one transition after the other, a resent batch of 500 took seconds.
create function stepwell.recorded_v1(me bigint, items stepwell.transition_v1[], records json) returns setof int
    language sql stable
    set search_path = pg_catalog, stepwell, pg_temp
    set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
    select distinct r.i
    from json_to_recordset(records) as r (i int, path int[], n int, at timestamptz) join unnest(items) x on x.i = r.i
    where (me, r.at) = (select o.worker, o.at from stepwell.outbox o
                        where o.run_id = x.run_id and o.epoch = x.epoch and o.path = r.path and o.n = r.n)
$$;

-- Part of flush_v1: apply what wake tasks tell of runs, and delete them. The tasks of these runs are locked.
create function stepwell.wake_v1(me bigint, items stepwell.transition_v1[], verdicts int[]) returns void
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_seqscan = off set enable_bitmapscan = off
    set enable_nestloop = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
    applied constant bigint[] := array(
        select x.task from unnest(items) x where x.then = 'wake' and verdicts[x.i] % 4 = 1);
    sent    constant uuid[] := array(
        select w.run_id from tasks w where w.id = any (applied) and w.name in ('signal', 'forget'));
    gone    uuid[];
    meant   uuid[];
    idle    bigint[];
    poison  tasks;
begin
    perform tell_v1(applied);

    -- What was sent to a run by a transaction that was still open when the run was forgotten.
    select array_agg(r.id) into gone from runs r where r.id = any (sent) and r.forgotten_at is not null;
    if gone is not null then
        delete from signals s where s.run_id = any (gone);
    end if;

    -- One in a later epoch was not meant, unless the run has only started anew since; and a second one changes nothing:
    -- what cleans up is not cut short.
    select array_agg(x.run_id) into meant
    from unnest(items) x
    join tasks w on w.id = any (applied) and w.id = x.task and w.name = 'cancel'
    join runs r on r.id = x.run_id and (r.epoch = x.epoch or has_only_continued(r.id, x.epoch, r.epoch))
    where r.id = any (array(select w.run_id from unnest(items) w where w.then = 'wake'))
      and not noted_cancelled(r.id, r.epoch);
    if meant is not null then
        perform cancel_v1(me, meant);
    end if;

    for poison in select w.* from tasks w where w.id = any (applied) and w.name = 'poison' loop
        select array_agg(t.id) into idle
        from tasks t join runs r on r.id = t.run_id and r.epoch = (poison.args ->> 'epoch')::int
        where t.run_id = poison.run_id and t.path = '{}' and t.kind not in ('wake', 'deliver');
        if idle is not null then
            perform stepwell.end_v1(me, idle, 'blocked', poison.args -> 'reason');
        end if;
    end loop;

    delete from tasks t where t.id = any (applied);
end
$$;

-- Whether something is there of what a run waits for. All that is there counts, not only what its wakes have told of:
-- these may be applied in another order than the run takes it.
create function stepwell.has_mail(run uuid, awaits text[]) returns boolean
    language sql stable
    set search_path = pg_catalog, stepwell, pg_temp
    set enable_seqscan = off set enable_bitmapscan = off
as $$
    select exists (
        select from stepwell.signals s
        where s.run_id = run
          and (s.name = any (awaits) or 'stepwell:child' = any (awaits) and s.name like 'stepwell:child:%'))
$$;

-- Part of wake_v1: runs are told of their signals, and of what has become of their children. A claimant that is
-- about to park has to look again; one that waits for this is readied.
create function stepwell.tell_v1(applied bigint[]) returns void
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_seqscan = off set enable_bitmapscan = off
    set enable_nestloop = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
    told uuid[];
    rung text[];
begin
    select array_agg(distinct w.run_id) into told from tasks w where w.id = any (applied) and w.name = 'signal';
    if told is null then
        return;
    end if;
    with news as (
        select w.run_id, count(*)::int as count,
               (count(*) filter (where c.counted))::int as counted,
               coalesce(bool_or(c.counted and (w.args ->> 'failed')::boolean), false) as failed
        from tasks w
        join runs r on r.id = any (told) and r.id = w.run_id
        -- What an earlier epoch of the run has counted, this one does not wait for.
        cross join lateral (
            select (w.args ->> 'counted')::boolean and (w.args ->> 'parent_epoch')::int = r.epoch as counted) c
        where w.id = any (applied) and w.name = 'signal'
        group by w.run_id),
    readied as (
        update tasks t
        set signals = t.signals + n.count,
            wakeups = t.wakeups + 1,
            pending = greatest(0, t.pending - n.counted),
            state = case when wakes.it and t.interruptions >= 2 then 'suspect' when wakes.it then 'ready' else t.state end,
            fresh = t.fresh and not wakes.it,
            turn = case when wakes.it then nextval('stepwell.turns') else t.turn end
        from news n
        join tasks o on o.run_id = any (told) and o.run_id = n.run_id and o.path = '{}' and o.kind not in ('wake', 'deliver')
        cross join lateral (
            select o.state = 'waiting'
                   and (n.failed or n.counted > 0 and o.pending <= n.counted
                        or o.awaits is not null and has_mail(o.run_id, o.awaits)) as it) wakes
        where t.run_id = any (told) and t.id = o.id and t.path = '{}' and t.kind not in ('wake', 'deliver')
        returning t.queue, t.state)
    select array_agg(distinct readied.queue) into rung from readied where readied.state = 'ready';
    perform ring(q) from unnest(rung) q;
end
$$;

-- Part of wake_v1: cancel runs. One that nobody has ever claimed ends here; any other is driven, so that its body can
-- clean up. Whoever executes something for it is told.
create function stepwell.cancel_v1(me bigint, meant uuid[]) returns void
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_seqscan = off set enable_bitmapscan = off
    set enable_nestloop = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
    untouched bigint[];
    rung      text[];
    owners    bigint[];
begin
    select array_agg(t.id) into untouched
    from tasks t
    where t.run_id = any (meant) and t.path = '{}' and t.kind not in ('wake', 'deliver') and t.attempt = 0
      and t.seq = 0;
    if untouched is not null then
        perform stepwell.end_v1(me, untouched, 'cancelled', null);
    end if;
    perform cancel_children_v1(meant);
    perform resume_calls(array(
        select t.run_id from tasks t
        where t.run_id = any (meant) and t.path = '{}' and t.kind not in ('wake', 'deliver') and t.paused));
    with cancelled as (
        update tasks t
        set cancelling = true, wakeups = t.wakeups + 1, paused = false,
            state = case when t.claimed_by is not null then t.state when t.interruptions >= 2 then 'suspect' else 'ready' end,
            fresh = t.fresh and t.claimed_by is not null,
            turn = case when t.claimed_by is null then nextval('stepwell.turns') else t.turn end
        where t.run_id = any (meant) and t.path = '{}' and t.kind not in ('wake', 'deliver')
        returning t.queue, t.state, t.claimed_by),
    executed as (
        update tasks t set cancelling = true
        where t.run_id = any (meant) and t.path > '{}' and t.kind not in ('wake', 'deliver') and t.kind = 'step'
          and t.claimed_by is not null and t.path[cardinality(t.path)] > 0    -- what is being undone is undone
        returning t.claimed_by)
    select (select array_agg(distinct c.queue) from cancelled c where c.state = 'ready'),
           (select array_agg(distinct o.claimed_by)
            from (select claimed_by from cancelled union all select claimed_by from executed) o
            where o.claimed_by is not null)
    into rung, owners;
    perform ring(q) from unnest(rung) q;
    -- A busy worker listens too, and does not wait for its next flush to hear of it (rare, so I1 stands).
    perform pg_notify('stepwell', 'worker ' || o) from unnest(owners) o;
end
$$;

-- End the runs of these tasks (locked by the caller, claimed by nobody who lives) in a state that no
-- worker decided: cancelled before anybody had it, blocked as poison. They count in shards of their own, behind those
-- of the flush that calls: rows of counters are locked in one order, or two flushes deadlock.
create function stepwell.end_v1(me bigint, tasks_to_end bigint[], end_state text, reason json) returns void
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_seqscan = off set enable_bitmapscan = off
    set enable_nestloop = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
    of_runs constant uuid[] := array(select t.run_id from tasks t where t.id = any (tasks_to_end));
begin
    with written as (
        insert into outbox (run_id, epoch, path, n, seq, kind, name, outcome, error, worker)
        select r.id, r.epoch, '{}', 0, t.seq + 1, 'run', r.workflow, end_state, reason, me
        from tasks t join runs r on r.id = t.run_id where t.id = any (tasks_to_end) and r.id = any (of_runs)
        returning kind, name, outcome)
    insert into counters as c (shard, kind, name, outcome, value)
    select 64 + pg_backend_pid() % 64, w.kind, w.name, w.outcome, count(*)
    from written w group by w.kind, w.name, w.outcome order by w.kind, w.name, w.outcome
    on conflict (shard, kind, name, outcome) do update set value = c.value + excluded.value;

    update runs r
    set state = end_state, error = reason, finished_at = clock_timestamp(),
        started_at = coalesce(r.started_at, t.started_at)
    from tasks t
    where t.id = any (tasks_to_end) and r.id = any (of_runs) and r.id = t.run_id;

    perform end_families_v1(of_runs);
end
$$;

-- For a transactional step: flush_v1 for one transition in the user's own transaction, which must not
-- commit unless it was applied. SW001: fenced. SW004: not applied, something else was recorded meanwhile. SW002: the user's code ended the transaction that the
-- worker had opened (the canary is gone), so what it wrote is not bound to this completion.
create function stepwell.commit_step_v1(me bigint, transitions json, records json, ends json, extras json, canary text)
returns int
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
as $$
declare
    verdict int;
begin
    if current_setting('stepwell.canary', true) is distinct from canary then
        raise exception 'stepwell: the step ended the transaction it was given' using errcode = 'SW002';
    end if;
    verdict := (stepwell.flush_v1(me, transitions, records, ends, extras))[1];
    if verdict % 4 = 3 then
        raise exception 'stepwell: the history has gone on' using errcode = 'SW004';
    end if;
    if verdict % 4 <> 1 then
        raise exception 'stepwell: the claim was lost' using errcode = 'SW001';
    end if;
    return verdict;
end
$$;

-- Ready the tasks whose time has come, in the order in which it came. Answers how many, and in how many
-- seconds the next is due (null: none).
create function stepwell.promote_v1(at_most int, out promoted int, out next_in float8)
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_sort = off set enable_seqscan = off set enable_bitmapscan = off
    set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
    -- In a variable: compared to the volatile function itself, the index condition would be a filter over all who wait.
    moment constant timestamptz := clock_timestamp();
    due   bigint[];
    drawn bigint[];
    rung  text[];
begin
    select array_agg(d.id), array_agg(nextval('stepwell.turns')) into due, drawn
    from (select t.id from tasks t
          where t.state = 'waiting' and t.due_at is not null and t.due_at <= moment
          order by t.due_at limit at_most for update skip locked) d;
    promoted := coalesce(cardinality(due), 0);
    if promoted > 0 then
        with readied as (
            update tasks t
            set state = case when t.interruptions >= 2 then 'suspect' else 'ready' end,
                turn = drawn[array_position(due, t.id)]
            where t.id = any (due) returning t.queue)
        select array_agg(distinct readied.queue) into rung from readied;
        perform ring(q) from unnest(rung) q;
    end if;
    select extract(epoch from t.due_at - clock_timestamp()) into next_in
    from tasks t where t.state = 'waiting' and t.due_at is not null order by t.due_at limit 1;
end
$$;

-- First act of a reclaim: from the moment this commits, the worker claims nothing (I11). FOR UPDATE waits
-- for a claim of its that is under way; a lock time-out (55P03) tells the caller to terminate the worker's
-- backends and to try again. Several may bury one worker; the first counts it, under what has noticed it.
create function stepwell.bury_v1(dead bigint, detector text default null) returns boolean
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set lock_timeout = '500ms'
as $$
begin
    perform 1 from workers w where w.id = dead for update;
    if not found then
        return false;
    end if;
    update workers w set dead_at = clock_timestamp() where w.id = dead and w.dead_at is null;
    if found and detector is not null then
        insert into counters as c (shard, kind, name, outcome, value) values (128, 'worker', detector, 'dead', 1)
        on conflict (shard, kind, name, outcome) do update set value = c.value + 1;
    end if;
    return true;
end
$$;

create function stepwell.poisoned(poison_after int) returns json
    language sql immutable
as $$
    select json_build_object(
        'type', 'PoisonStep',
        'message', format('the worker process died %s times while it executed nothing but this step', poison_after))
$$;

-- Second act, repeated until it answers 0 and nothing is left: free the dead worker's tasks, a chunk at a
-- time, skipping rows that a backend of its still locks. An execution may have been interrupted in each:
-- the next claimant records that. From the second death on, a task is a suspect and is tried alone; one
-- that died alone poison_after times blocks its run. The last call deletes the worker.
create function stepwell.reclaim_v1(dead bigint, poison_after int, at_most int, out reclaimed int, out remaining boolean)
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_seqscan = off set enable_bitmapscan = off
    set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
    ids    bigint[];
    poison bigint[];
    steps  bigint[];
    rung   text[];
begin
    if exists (select from workers w where w.id = dead and w.dead_at is null) then
        raise exception 'stepwell: worker % was not buried', dead using errcode = '55000';
    end if;
    select array_agg(f.id order by f.id),
           array_agg(f.id order by f.id) filter (where f.kind = 'run' and f.solo and f.solo_deaths + 1 >= poison_after),
           array_agg(f.id order by f.id) filter (where f.kind = 'step' and f.solo and f.solo_deaths + 1 >= poison_after)
    into ids, poison, steps
    from (select t.id, t.kind, t.solo, t.solo_deaths from tasks t
          where t.state = 'claimed' and t.claimed_by = dead limit at_most for update skip locked) f;
    if poison is not null then
        perform stepwell.end_v1(dead, poison, 'blocked', poisoned(poison_after));
    end if;
    -- The task of its run is not locked here, so that a flush has to block it.
    perform wake(t.run_id, 'poison', json_build_object('epoch', r.epoch, 'reason', poisoned(poison_after)))
    from tasks t join runs r on r.id = t.run_id where t.id = any (steps);
    with freed as (
        update tasks t
        set state = case when t.id = any (steps) then 'waiting' when t.paused then 'paused'
                         when t.kind in ('run', 'step') and t.interruptions >= 1 then 'suspect' else 'ready' end,
            claimed_by = null, fresh = false, turn = nextval('stepwell.turns'), interrupted = true,
            interruptions = t.interruptions + 1, solo_deaths = t.solo_deaths + t.solo::int, solo = false
        where t.id = any (ids)
        returning t.queue)
    select array_agg(distinct freed.queue) into rung from freed;
    perform ring(q) from unnest(rung) q;
    reclaimed := coalesce(cardinality(ids), 0);
    remaining := exists (select from tasks t where t.state = 'claimed' and t.claimed_by = dead);
    if not remaining then
        delete from doorbell d where d.worker = dead;
        delete from workers w where w.id = dead;
    end if;
end
$$;


-- =====================================================================================================
-- 4. Roles
-- =====================================================================================================
--
-- Grant them to your own login roles. A producer may only call the public functions and reads no payload;
-- a viewer reads everything and writes nothing; a worker runs the protocol. Roles belong to the cluster:
-- where the installing user may not create them, or another database has, their absence is no error.

do $$
declare
    r text;
begin
    foreach r in array array['stepwell_producer', 'stepwell_worker', 'stepwell_viewer'] loop
        if not exists (select from pg_roles where rolname = r) then
            begin
                execute format('create role %I nologin', r);
            exception
                when duplicate_object or unique_violation then null;      -- another database's install, just now
                when insufficient_privilege then
                    raise warning 'stepwell: may not create role %, so nothing is granted to it', r;
            end;
        end if;
    end loop;
end
$$;

revoke all on schema stepwell from public;
revoke all on all functions in schema stepwell from public;

do $$
begin
    if exists (select from pg_roles where rolname = 'stepwell_producer') then
        grant usage on schema stepwell to stepwell_producer;
        grant execute on function stepwell.enqueue, stepwell.enqueue_many, stepwell.signal, stepwell.cancel,
            stepwell.current_version to stepwell_producer;
        grant select on stepwell.workflows to stepwell_producer;      -- to check a name and an input; no payload
    end if;
    if exists (select from pg_roles where rolname = 'stepwell_viewer') then
        grant usage on schema stepwell to stepwell_viewer;
        grant select on all tables in schema stepwell to stepwell_viewer;
    end if;
    if exists (select from pg_roles where rolname = 'stepwell_worker') then
        grant usage on schema stepwell to stepwell_worker;
        grant execute on all functions in schema stepwell to stepwell_worker;
        grant select, insert, update, delete on all tables in schema stepwell to stepwell_worker;
        revoke insert, update, delete on stepwell.migrations from stepwell_worker;
        grant usage on all sequences in schema stepwell to stepwell_worker;
    end if;
end
$$;
