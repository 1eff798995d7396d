-- Whether workers that came after this one and its siblings carry a name, in one of its queues: in a rolling deploy they
-- have the newer code.
-- Index: none, a row for each worker process.
-- Locks: none.
with crews as (
    select coalesce(w.supervisor, w.id) as crew, min(w.started_at) as since, bool_or(w.id = %(me)s) as mine,
           bool_or(%(name)s = any (w.names)
                   and w.queues && (select m.queues from stepwell.workers m where m.id = %(me)s)) as carries
    from stepwell.workers w
    where w.dead_at is null
    group by coalesce(w.supervisor, w.id))
select exists (
    select from crews other join crews own on own.mine
    where not other.mine and other.carries and other.since > own.since)
