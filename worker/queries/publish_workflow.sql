-- Say what this worker knows, so that producers can check a name and an input.
-- Index: workflows' primary key.
-- Locks: the row of this workflow; callers go by sorted name.
insert into stepwell.workflows (name, version, input_schema, queue)
values (%s, %s, %s, %s)
on conflict (name, version) do update
set input_schema = excluded.input_schema, queue = excluded.queue, seen_at = clock_timestamp()
