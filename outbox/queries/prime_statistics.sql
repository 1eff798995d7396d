-- Purpose: give the planner statistics of a busy system before there is one. A claim on a table that was
-- never analysed, with half a million tasks in it, costs a hundred times one that was. Inserts
-- representative rows, analyses them and deletes them again, in the caller's transaction: what ANALYZE
-- found out stays, and a later ANALYZE of an empty table keeps it.
-- Index: none, sequential scans over its own rows. Locks: runs, tasks, outbox, as ANALYZE takes them.
do $$
declare
  ids constant uuid[] := array(select stepwell.new_id() from generate_series(1, 3000));
begin
  insert into stepwell.runs (id, workflow, priority, input, state, output, created_at, started_at, finished_at)
  select id, 'workflow_' || i % 5, case when i % 20 = 0 then i / 20 % 10 else 5 end,
         json_build_object('lead', json_build_object('id', i, 'name', repeat('x', 40))),
         case when i % 3 = 0 then 'open' else 'succeeded' end,
         case when i % 3 <> 0 then to_json(i) end,
         clock_timestamp() - i * interval '1 second',
         clock_timestamp() - i * interval '1 second',
         case when i % 3 <> 0 then clock_timestamp() end
    from unnest(ids) with ordinality as one (id, i);

  -- Mostly ready and fresh; a tenth claimed by a handful of workers, a tenth waiting, most of it for a time.
  insert into stepwell.tasks (run_id, name, queue, priority, fresh, state, due_at, attempt, doing, position, seq,
                              claimed_by, started_at)
  select id, 'workflow_' || i % 5, case when i % 10 = 0 then 'queue_' || i / 10 % 3 else 'default' end,
         case when i % 20 = 0 then i / 20 % 10 else 5 end,
         i % 10 in (0, 1, 2, 3, 4, 5),
         case when i % 10 = 9 then 'claimed' when i % 10 = 8 then 'waiting'
              when i % 100 = 7 then 'shelved' when i % 100 = 17 then 'suspect' else 'ready' end,
         case when i % 10 = 8 and i % 50 <> 8 then clock_timestamp() + i * interval '1 second' end,
         case when i % 10 >= 6 then 1 else 0 end,
         case when i % 10 >= 6 then array[i % 4] end,
         case when i % 10 >= 6 then i % 4 else 0 end,
         case when i % 10 >= 6 then i % 4 else 0 end,
         case when i % 10 = 9 then i / 10 % 8 + 1 end,
         case when i % 10 >= 6 then clock_timestamp() end
    from unnest(ids) with ordinality as one (id, i);

  insert into stepwell.outbox (run_id, epoch, path, n, seq, kind, name, fingerprint, outcome, value, worker)
  select id, 0, case when step = 3 then '{}' else array[step] end, 0, step,
         case when step = 3 then 'run' else 'step' end,
         case when step = 3 then 'workflow_' || i % 5 else 'step_' || step end,
         hashint8(i), case when step = 3 then 'succeeded' else 'completed' end, to_json(i), i % 8 + 1
    from unnest(ids) with ordinality as one (id, i), generate_series(1, 3) as step;

  analyze stepwell.runs, stepwell.tasks, stepwell.outbox;

  delete from stepwell.outbox where run_id = any (ids);
  delete from stepwell.tasks where run_id = any (ids);
  delete from stepwell.runs where id = any (ids);
end
$$
