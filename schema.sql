-- Stepwell: the whole database, in reading order.
--
--   1. tables       what is known: runs, keys, tasks, outbox, workers, workflows, counters, doorbell
--   2. producers    the public functions, callable from any language inside the caller's transaction:
--                   enqueue, enqueue_many, cancel, retry; the view run_status
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
-- run saw. Times are those of the database's clock. `stepwell migrate` installs this file.

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
    encoding    text not null default 'plain',     -- how input, output and the history's values are stored
    parent_id   uuid,
    parent_path int[],
    deadline_at timestamptz,
    trace       text,
    epoch       int not null default 0,            -- retries, rewinds, fresh starts
    created_at  timestamptz not null default clock_timestamp(),
    started_at  timestamptz,
    finished_at timestamptz,
    state       text not null default 'open',
    output      json,
    error       json,                              -- {"type", "message", "data"?, "trace"?}
    constraint runs_workflow_named check (octet_length(workflow) between 1 and 255),
    constraint runs_priority_range check (priority between 0 and 9),
    constraint runs_input_object   check (json_typeof(input) = 'object'),
    constraint runs_state_known    check (state in ('open', 'succeeded', 'failed', 'cancelled', 'blocked')),
    constraint runs_ends_have_time check ((state = 'open') = (finished_at is null))
) with (fillfactor = 85);

alter table stepwell.runs alter column input set storage external, alter column output set storage external;

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
--   wake     a fact to apply to a run that another transaction must not lock (cancel, signal)
--   deliver  a message to deliver
-- States: ready (claimable) · claimed · waiting (for due_at or for others) · shelved (ready, but no live
-- worker knows its name) · suspect (ready, but two claims of it died: it is tried alone).
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
    claimed_by    bigint,
    started_at    timestamptz,                         -- first claim
    args          json,
    constraint tasks_kind_known    check (kind in ('run', 'step', 'wake', 'deliver')),
    constraint tasks_state_known   check (state in ('ready', 'claimed', 'waiting', 'shelved', 'suspect')),
    constraint tasks_claim_owned   check ((state = 'claimed') = (claimed_by is not null)),
    constraint tasks_pending_count check (pending >= 0)
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
        autovacuum_analyze_scale_factor = 0.1, autovacuum_vacuum_cost_delay = 0);

alter table stepwell.tasks alter column args set storage external;

-- The identity of a run's and a step's task. Wakes have none: any number may be under way.
create unique index tasks_identity on stepwell.tasks (run_id, path) where kind in ('run', 'step');
create index tasks_ready   on stepwell.tasks (queue, priority, fresh, turn) where state = 'ready';
create index tasks_due     on stepwell.tasks (due_at) where state = 'waiting' and due_at is not null;
create index tasks_claimed on stepwell.tasks (claimed_by) where state = 'claimed';
create index tasks_set_aside on stepwell.tasks (state, queue, name, turn) where state in ('shelved', 'suspect');

-- What has happened and will not be done again: append-only, one row for each execution of a step
-- (n = 0 the final outcome, n >= 1 the nth execution that failed or was interrupted), each finished
-- sleep, each end of a run (kind run, path '{}') and each new epoch.
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
    constraint outbox_kind_known check (kind in ('step', 'sleep', 'run', 'epoch')),
    constraint outbox_outcome_fits check (case
        when kind = 'run'   then n = 0 and path = '{}' and outcome in ('succeeded', 'failed', 'cancelled', 'blocked')
        when kind = 'epoch' then n = 1 and path = '{}' and outcome in ('retry')
        when n = 0          then outcome in ('completed', 'failed')
        else n > 0 and outcome in ('failed', 'interrupted') end)
) with (fillfactor = 100);

alter table stepwell.outbox alter column value set storage external;

-- Finds the ends that somebody may have to look at without an index on runs that every end would touch.
create index outbox_unhappy_ends on stepwell.outbox (outcome, at) where kind = 'run' and outcome <> 'succeeded';

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
-- two flushes seldom meet on a row: 0 to 63 what claimants wrote, 64 to 127 what end_v1 did.
create table stepwell.counters (
    shard   smallint not null,
    kind    text not null,                -- run, step
    name    text not null,
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

-- Enqueue one run for each input, in the caller's transaction; answers in the order of the inputs.
-- A key that is known already gives the id of its first run and created = false, and its input is
-- ignored. Without a queue it is the one that the workers publish for the workflow. Keys are inserted in sorted order, so that two callers cannot deadlock; a READ COMMITTED
-- caller never sees an error for a conflict, stricter levels may see 40001.
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
    version  text        default '')
returns table (id uuid, created boolean)
    language plpgsql security definer
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
    many    constant int := coalesce(cardinality(inputs), 0);
    v_queue constant text := coalesce(
        enqueue_many.queue,
        (select w.queue from workflows w where w.name = enqueue_many.workflow order by w.seen_at desc limit 1),
        'default');
    due     constant timestamptz := coalesce(enqueue_many.at, clock_timestamp() + enqueue_many.delay);
    ids     uuid[];
    owners  uuid[];
begin
    if enqueue_many.workflow is null or octet_length(enqueue_many.workflow) not between 1 and 255 then
        raise exception 'stepwell: the workflow name must have 1 to 255 bytes' using errcode = '22023';
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
    if enqueue_many.keys is not null and cardinality(enqueue_many.keys) <> many then
        raise exception 'stepwell: % inputs but % keys', many, cardinality(enqueue_many.keys) using errcode = '22023';
    end if;
    if exists (select from unnest(inputs) i where i is null or json_typeof(i) <> 'object') then
        raise exception 'stepwell: the input of a run must be a JSON object, parameter name to value'
            using errcode = '22023', hint = 'for one parameter "lead": {"lead": ...}';
    end if;
    if exists (select from unnest(enqueue_many.keys) k where octet_length(k) > 512) then
        raise exception 'stepwell: a key has more than 512 bytes' using errcode = '22023';
    end if;
    if many = 0 then
        return;
    end if;

    select array_agg(new_id()) into ids from generate_series(1, many);
    owners := ids;
    if exists (select from unnest(enqueue_many.keys) k where k is not null) then
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

    insert into runs (id, workflow, version, queue, priority, tenant, lane, labels, input, deadline_at)
    select n.id, enqueue_many.workflow, enqueue_many.version, v_queue, enqueue_many.priority, enqueue_many.tenant,
           enqueue_many.lane, enqueue_many.labels, n.input, clock_timestamp() + enqueue_many.deadline
    from unnest(ids, owners, inputs) with ordinality as n (id, owner, input, i)
    where n.id = n.owner
    order by n.i;

    insert into tasks (run_id, name, queue, priority, tenant, lane, state, due_at)
    select n.id, enqueue_many.workflow, v_queue, enqueue_many.priority, enqueue_many.tenant, enqueue_many.lane,
           case when due > clock_timestamp() then 'waiting' else 'ready' end, due
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
    version  text        default '')
returns uuid
    language sql security definer
    set search_path = pg_catalog, stepwell, pg_temp
as $$
    select e.id from stepwell.enqueue_many(
        enqueue.workflow, array[enqueue.input],
        case when enqueue.key is null then null else array[enqueue.key] end,
        enqueue.queue, enqueue.priority, enqueue.delay, enqueue.at, enqueue.lane, enqueue.tenant,
        enqueue.labels, enqueue.deadline, enqueue.version) e
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
    insert into tasks (run_id, kind, name, queue, priority, fresh, args)
    values (run, 'wake', 'cancel', 'stepwell', 0, false, json_build_object('epoch', meant));
    perform ring('stepwell');
    return true;
end
$$;

-- Open a failed, cancelled or blocked run again: what completed stays completed, what failed is tried
-- anew. Answers the new epoch, or null when the run is not in such a state. The row lock on the run makes
-- a second retry at the same moment answer null; no task exists then that a claimant could hold.
create function stepwell.retry(run uuid) returns int
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
as $$
declare
    r runs;
    last_seq int;
    opened timestamptz;
    moment constant timestamptz := clock_timestamp();
begin
    select * into r from runs where id = run and state in ('failed', 'cancelled', 'blocked') for update;
    if not found then
        return null;
    end if;
    select coalesce(max(seq), 0) + 1, coalesce(max(at) filter (where kind = 'epoch'), r.created_at)
    into last_seq, opened from outbox where run_id = run;
    insert into outbox (run_id, epoch, path, n, seq, kind, name, outcome, at)
    values (run, r.epoch + 1, '{}', 1, last_seq, 'epoch', r.workflow, 'retry', moment);
    -- The deadline counted from enqueue, or from the retry before.
    update runs set state = 'open', epoch = r.epoch + 1, finished_at = null, output = null, error = null,
                    deadline_at = moment + (r.deadline_at - opened)
    where id = run;
    insert into tasks (run_id, name, queue, priority, tenant, lane, fresh, seq)
    values (run, r.workflow, r.queue, r.priority, r.tenant, r.lane, false, last_seq);
    perform ring(r.queue);
    return r.epoch + 1;
end
$$;

-- A run as people mean it. pending = never claimed, running = a task of it is claimed, else waiting.
create view stepwell.run_status as
select r.id, r.workflow, r.version, r.queue, r.priority, r.labels, r.epoch, r.parent_id,
       case when r.state <> 'open' then r.state
            when t.state = 'claimed' then 'running'
            when t.attempt = 0 and t.fresh then 'pending'
            else 'waiting' end as status,
       r.created_at, coalesce(r.started_at, t.started_at) as started_at, r.finished_at, r.deadline_at,
       t.id as task, t.state as task_state, t.due_at, t.attempt, t.doing, t.interruptions, t.cancelling, t.claimed_by
from stepwell.runs r
left join stepwell.tasks t on t.run_id = r.id and t.kind = 'run' and t.path = '{}';


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
    from (select t.id from tasks t
          where t.state = 'shelved' and t.queue = any (my_queues) and t.name = any (my_names)
          limit at_most for update skip locked) f;
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

-- Claim up to at_most ready tasks of one queue, and the wakes that wait, for a worker that is alive.
--
-- I3: the worker's own row is locked first; no row, no claim: a dead worker's statement that still sits
--     in a socket buffer finds nothing. The caller sees 'SW003'.
-- I2: at_most is the number of free slots.
-- floors: for each group (priority * 2 + fresh) the turn below which this worker has seen everything
--     claimed: without it one old open transaction makes each claim walk all dead index entries.
-- alone: take one suspect instead. The caller has nothing else in flight.
create function stepwell.claim_v1(
    me bigint, on_queue text, known text[], at_most int, floors bigint[], alone boolean default false)
returns table (
    task bigint, run_id uuid, kind text, name text, attempt int, "position" int, doing int[], wakeups int, seq int,
    interrupted boolean, interruptions int, cancelling boolean, turn bigint, grp int,
    due_in float8, waited float8, deadline_in float8, running_for float8, now timestamptz,
    epoch int, created_at timestamptz, version text, labels text, input text)
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
        return;
    end if;
    with taken as (
        update tasks t
        set state = 'claimed', claimed_by = me, attempt = t.attempt + 1, solo = alone and t.kind = 'run',
            started_at = coalesce(t.started_at, clock_timestamp())
        where t.id = any (ids) returning t.run_id, t.kind)
    select array_agg(taken.run_id) filter (where taken.kind = 'run') into of_runs from taken;
    delete from doorbell d where d.worker = me;
    return query
        select t.id, t.run_id, t.kind, t.name, t.attempt, t.position, t.doing, t.wakeups, t.seq,
               t.interrupted, t.interruptions, t.cancelling, t.turn, t.priority * 2 + t.fresh::int,
               extract(epoch from t.due_at - clock_timestamp())::float8,
               case when t.attempt = 1 or t.due_at is not null
                    then extract(epoch from clock_timestamp() - coalesce(t.due_at, r.created_at))::float8 end,
               extract(epoch from r.deadline_at - clock_timestamp())::float8,
               extract(epoch from clock_timestamp() - t.started_at)::float8, clock_timestamp(),
               coalesce(r.epoch, (t.args ->> 'epoch')::int), r.created_at, r.version, r.labels::text, r.input::text
        from tasks t
        left join runs r on r.id = any (of_runs) and r.id = t.run_id and t.kind = 'run'
        where t.id = any (ids)
        order by array_position(ids, t.id);
end
$$;

-- Note that this worker is idle on these queues for so many seconds: enqueue rings for it meanwhile.
create function stepwell.idle_v1(me bigint, my_queues text[], lease float8) returns void
    language sql
    set search_path = pg_catalog, stepwell, pg_temp
as $$
    insert into stepwell.doorbell (worker, queue, until)
    select me, q, clock_timestamp() + make_interval(secs => lease) from unnest(my_queues) q order by q
    on conflict (worker, queue) do update set until = excluded.until
$$;

-- One transition of one claimed task, as the claimant sends it.
--   then = move     the claim goes on, at path `doing`
--          park     wait for due_at, or for others; ready at once if something woke it meanwhile
--          release  give it back, ready
--          finish   the run ends: `ends` says how
--          wake     apply this wake task to its run, and delete it
create type stepwell.transition_v1 as (
    i int,                 -- 1, 2, … within the flush
    task bigint, attempt int, "position" int,
    run_id uuid, epoch int,
    "then" text,
    doing int[],
    records int,           -- how many records belong to it
    delay float8,          -- park: seconds from now, or
    until timestamptz,     -- park: not before
    wakeups int);          -- park: what the claimant knew of

-- Write down what happened, for many tasks in one transaction. Answers for each transition, in order:
--   0 fenced · 1 applied · 2 already applied before (a resend) · plus 4 when the run is to be cancelled.
--
-- records: what happened, [{i, k, path, n, kind, name, fingerprint, outcome, value, error, at}]: i is the
--          transition that it belongs to, k = 1, 2, … within that
-- ends:    [{i, state, output, error}]
--
-- 1. lock own and target task rows in order of id (any other order deadlocks two flushes);
-- 2. test the fence in a new statement, which sees what the lock waited for (I8);
-- 3. append the history, count it; 4. write the task rows; 5. end runs; 6. apply wakes.
-- Nothing locks a task row after 1., so a flush never waits while it holds one.
create function stepwell.flush_v1(me bigint, transitions json, records json, ends json) returns int[]
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
    waking   boolean;
    leaving  boolean;
begin
    select array_agg(x order by x.i), array_agg(x.task), array_agg(x.run_id) filter (where x.then = 'finish'),
           bool_or(x.then = 'wake'), bool_or(x.then = 'release')
    into items, locking, closing, waking, leaving
    from json_populate_recordset(null::transition_v1, transitions) x;
    if waking then
        locking := locking || array(
            select t.id from tasks t
            where t.run_id = any (array(select x.run_id from unnest(items) x where x.then = 'wake'))
              and t.path = '{}' and t.kind in ('run', 'step'));
    end if;
    perform 1 from tasks t where t.id = any (locking) order by t.id for update;

    select array_agg(
        case when t.attempt = x.attempt and t.claimed_by = me then
                  case when t.position = x.position then 1 when t.position > x.position then 2 else 0 end
             when t.attempt = x.attempt and t.claimed_by is null and t.position = x.position + 1 then 2
             else 0 end
        + case when t.cancelling then 4 else 0 end
        order by x.i)
    into verdicts
    from unnest(items) x left join tasks t on t.id = any (locking) and t.id = x.task;

    -- A resend whose row went on or is gone: the history knows whether it was applied (I10).
    if 0 = any (verdicts) or 4 = any (verdicts) then
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
        where verdicts[r.i] % 4 = 1
        returning kind, name, outcome)
    insert into counters as c (shard, kind, name, outcome, value)
    select pg_backend_pid() % 64, w.kind, w.name, w.outcome, count(*)
    from written w where w.kind in ('run', 'step')
    group by w.kind, w.name, w.outcome order by w.kind, w.name, w.outcome
    on conflict (shard, kind, name, outcome) do update set value = c.value + excluded.value;

    -- A move touches no indexed column, so it stays within its page (HOT). A suspect that is given back without
    -- progress remains one.
    update tasks t
    set position = t.position + 1,
        seq = t.seq + x.records,
        doing = case when x.then = 'release' then t.doing else x.doing end,
        interrupted = t.interrupted and x.then = 'release',
        interruptions = case when x.then = 'release' or x.doing is not distinct from t.doing
                                  or (t.doing is null and t.interrupted) then t.interruptions else 0 end,
        solo_deaths = case when x.then = 'release' or x.doing is not distinct from t.doing
                                or (t.doing is null and t.interrupted) then t.solo_deaths else 0 end,
        claimed_by = case when x.then = 'move' then me end,
        state = case when x.then = 'move' then 'claimed'
                     when x.then = 'park' and t.wakeups = x.wakeups and not t.cancelling then 'waiting'
                     when t.interruptions >= 2
                          and (x.then = 'release' or x.doing is not distinct from t.doing
                               or (t.doing is null and t.interrupted)) then 'suspect'
                     else 'ready' end,
        fresh = case when x.then = 'move' then t.fresh else false end,
        turn = case when x.then = 'move' then t.turn else nextval('stepwell.turns') end,
        due_at = case when x.then = 'release' then t.due_at
                      when x.then = 'park' then coalesce(x.until, clock_timestamp() + make_interval(secs => x.delay)) end
    from unnest(items) x
    where t.id = any (locking) and t.id = x.task
      and verdicts[x.i] % 4 = 1 and x.then in ('move', 'park', 'release');

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

-- Part of flush_v1: apply cancellations and delete their wake tasks. The target rows are locked. A run that a
-- worker executes is told at its next flush; any other ends here, and one in a later epoch was not meant.
create function stepwell.wake_v1(me bigint, items stepwell.transition_v1[], verdicts int[]) returns void
    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_seqscan = off set enable_bitmapscan = off
    set enable_nestloop = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
    meant uuid[];
    idle  bigint[];
begin
    select array_agg(x.run_id) into meant
    from unnest(items) x join runs r on r.id = x.run_id and r.epoch = x.epoch
    where r.id = any (array(select w.run_id from unnest(items) w where w.then = 'wake'))
      and x.then = 'wake' and verdicts[x.i] % 4 = 1;
    -- claimed_by, not state: that has an index of its own, with all that is claimed in it.
    update tasks t set cancelling = true, wakeups = t.wakeups + 1
    where t.run_id = any (meant) and t.path = '{}' and t.kind in ('run', 'step') and t.claimed_by is not null;

    select array_agg(t.id) into idle
    from tasks t
    where t.run_id = any (meant) and t.path = '{}' and t.kind in ('run', 'step') and t.claimed_by is null;
    if idle is not null then
        perform stepwell.end_v1(me, idle, 'cancelled', null);
    end if;

    delete from tasks t
    where t.id = any (array(select x.task from unnest(items) x where x.then = 'wake' and verdicts[x.i] % 4 = 1));
end
$$;

-- End the runs of these tasks (locked by the caller, claimed by nobody who lives) in a state that no
-- worker decided: cancelled while idle, blocked as poison. They count in shards of their own, behind those of the
-- flush that calls: rows of counters are locked in one order, or two flushes deadlock.
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

    delete from tasks t where t.id = any (tasks_to_end);
end
$$;

-- For a transactional step: flush_v1 for one transition in the user's own transaction, which must not
-- commit unless it was applied. SW001: fenced. SW002: the user's code ended the transaction that the
-- worker had opened (the canary is gone), so what it wrote is not bound to this completion.
create function stepwell.commit_step_v1(me bigint, transitions json, records json, ends json, canary text)
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
    verdict := (stepwell.flush_v1(me, transitions, records, ends))[1];
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
-- backends and to try again.
create function stepwell.bury_v1(dead bigint) returns boolean
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
    return true;
end
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
    rung   text[];
begin
    if exists (select from workers w where w.id = dead and w.dead_at is null) then
        raise exception 'stepwell: worker % was not buried', dead using errcode = '55000';
    end if;
    select array_agg(f.id order by f.id),
           array_agg(f.id order by f.id) filter (where f.kind = 'run' and f.solo and f.solo_deaths + 1 >= poison_after)
    into ids, poison
    from (select t.id, t.kind, t.solo, t.solo_deaths from tasks t
          where t.state = 'claimed' and t.claimed_by = dead limit at_most for update skip locked) f;
    if poison is not null then
        perform stepwell.end_v1(dead, poison, 'blocked', json_build_object(
            'type', 'PoisonStep',
            'message', format('the worker process died %s times while it executed nothing but this step', poison_after)));
    end if;
    with freed as (
        update tasks t
        set state = case when t.kind = 'run' and t.interruptions >= 1 then 'suspect' else 'ready' end,
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
        grant execute on function stepwell.enqueue, stepwell.enqueue_many, stepwell.cancel to stepwell_producer;
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
