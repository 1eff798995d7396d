-- Purpose: take one step of a migration and be in nobody's way for long. Whoever wants a lock on a table behind one that
--   waits for an exclusive one waits as well: so this waits for 50 ms, and tries again after a pause in which it holds
--   nothing, no lock and no snapshot. All of it is one statement: between getting the lock and giving it back there is no
--   client to wait for, be it slow, frozen or dead; nor a disk, nor a standby, as the commit is asynchronous.
--   What stands in <angle brackets> is filled in: tables as an array, seconds to go on trying, the step, its record.
-- Index: none.
-- Locks: the tables that are named, share update exclusive: that waits for a vacuum alone, which gives way after a second,
--   and begins no more meanwhile; nobody else minds. Then those of the step; then the new row of migrations.
do $patiently$
declare
    tables       constant text[] := '<tables>';
    patience     constant int := greatest(<seconds> * 1000, 1);
    give_up      constant timestamptz := clock_timestamp() + make_interval(secs => <seconds>);
    pause        float8 := 0.1;
    users        text[];
    users_before text[];
    staying      text;
    told         text;
    one          text;
begin
    loop
        begin
            perform set_config('lock_timeout', patience || 'ms', true);
            foreach one in array tables loop
                execute format('lock table stepwell.%I in share update exclusive mode', one);
            end loop;
            -- Of several tables the first is held while the others are waited for.
            perform set_config('lock_timeout', 50 / greatest(cardinality(tables), 1) || 'ms', true);
            perform set_config('synchronous_commit', 'off', true);
            <record>;    -- first: a step that was taken already is not taken again
            execute <migration>;
            return;
        exception when lock_not_available or deadlock_detected then
            null;
        end;
        rollback;

        -- Who is in the way: a transaction that was among the users of these tables at the last try as well.
        users := array(
            select coalesce(l.pid::text, 'of a prepared transaction') || ' ' || l.virtualtransaction
            from pg_catalog.pg_locks l
            where l.locktype = 'relation' and l.granted and l.pid is distinct from pg_backend_pid()
              and l.relation in (select to_regclass(format('stepwell.%I', t)) from unnest(tables) t)
              and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database()));
        staying := (
            select string_agg(distinct regexp_replace(u, ' [^ ]*$', ''), ', ')
            from unnest(users) u where u = any (users_before));
        if clock_timestamp() >= give_up and users_before is not null then
            raise exception 'stepwell: migration <title> found no moment in which no transaction was using what it changes%',
                coalesce(': process ' || staying || ' has one open', '') using errcode = 'lock_not_available';
        elsif staying <> coalesce(told, '') then
            told := staying;
            raise notice 'stepwell: migration <title> waits for the transaction of process %', staying;
        end if;
        users_before := users;
        -- Where one transaction follows the other, it has to be waiting when one ends: not too seldom, then.
        perform pg_sleep(pause * (0.5 + random() / 2));
        pause := least(pause * 1.5, 0.4);
    end loop;
end
$patiently$
