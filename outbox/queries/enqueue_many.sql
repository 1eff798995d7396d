-- Purpose: enqueue one run for each input, in the transaction that is open; one (id, created) for each, in
--   the order of the inputs.
-- Index: primary key of keys (workflow, key), inside the function.
-- Locks: the new key rows, in the order of the keys. No row of a claimant (I15).
-- Arrays go in binary (b): psycopg escapes each element of a text array in Python, at 15 microseconds apiece.
-- The id comes as text, because a caller's connection may have loaders of its own for uuid.
select e.id::text, e.created
from stepwell.enqueue_many(
    workflow => %(workflow)s::text,
    inputs   => %(inputs)b::text[]::json[],
    keys     => %(keys)b::text[],
    queue    => %(queue)s::text,
    priority => %(priority)s::int,
    delay    => make_interval(secs => %(delay)s::float8),
    at       => %(at)s::timestamptz,
    lane     => %(lane)s::text,
    tenant   => %(tenant)s::text,
    labels   => %(labels)s::jsonb,
    deadline => make_interval(secs => %(deadline)s::float8),
    version  => %(version)s::text,
    trace    => %(trace)s::text) e;
