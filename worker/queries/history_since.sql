-- The history of one run since it started anew, in the order in which things happened.
-- Index: outbox's primary key, by its first two columns.
-- Locks: none.
select o.run_id, o.path, o.n, o.kind, o.name, o.outcome, o.value::text, o.error::text, o.fingerprint, o.at, o.seq, o.epoch
from stepwell.outbox o
where o.run_id = %s and o.epoch >= %s
order by o.seq
