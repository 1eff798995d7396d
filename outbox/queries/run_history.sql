-- Purpose: the history of one run, in the order in which it happened.
-- Index: primary key of outbox (run_id, …). Locks: none.
select o.seq, o.epoch, o.path, o.n, o.kind, o.name, o.outcome, o.value::text, o.error::text, o.fingerprint, o.worker,
       o.at
from stepwell.outbox o
where o.run_id = %(run)s::uuid
order by o.seq, o.epoch, o.path, o.n;
