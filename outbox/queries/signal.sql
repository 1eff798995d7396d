-- Purpose: send a signal to a run; answers whether it was open (a blocked one counts as open).
-- Index: primary key of runs, inside the function. Locks: none; a signal and a wake task are inserted (I15).
select stepwell.signal(%(run)s::uuid, %(name)s::text, %(payload)s::text::json, %(trace)s::text);
