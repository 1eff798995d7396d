-- Purpose: say that these workers' supervisor lives; answers which of them the database knows as alive. The beat
-- of a buried worker stands still, so that a reclaim that was cut short is taken up by another observer.
-- Index: workers' primary key.
-- Locks: the workers' rows (no key update: a claim's key share does not wait for it, nor it for a claim).
update stepwell.workers
   set beat = beat + 1
 where id = any (%s) and dead_at is null
returning id;
