-- What is recorded of one step, with what opened the epochs of its run, in the order in which it happened.
-- Index: outbox's primary key, all of its columns: one look-up for each epoch.
-- Locks: none.
select o.run_id, o.path, o.n, o.kind, o.name, o.outcome, o.value::text, o.error::text, o.fingerprint, o.at, o.seq, o.epoch
from generate_series(%(base)s::int, %(epoch)s::int) e (epoch)
cross join lateral (
    select * from stepwell.outbox p
    where p.run_id = %(run)s and p.epoch = e.epoch and p.path = %(path)s::int[]
    union all
    select * from stepwell.outbox p
    where p.run_id = %(run)s and p.epoch = e.epoch and p.path = '{}' and p.n = 1) o
order by o.seq
