-- Purpose: say that these workers' supervisor lives; answers which of them the database knows as alive. A row that
-- somebody holds is left out this time, so that one lock never stops the beats of all. The beat of a buried worker
-- stands still, so that a reclaim that was cut short is taken up by another observer. A beat says whether a lock is held
-- beside it, and need not be durable: observers start anew after a restart, and it must not wait for a replica that is away.
-- Index: workers' primary key.
-- Locks: the workers' rows (no key update, skip locked; a claim's key share is no obstacle).
with ours as materialized (
    select w.id from stepwell.workers w where w.id = any (%(workers)s) and w.dead_at is null),
free as materialized (
    select w.id from ours join stepwell.workers w on w.id = ours.id for no key update of w skip locked),
beaten as (
    update stepwell.workers w set beat = w.beat + 1, locking = %(locking)s from free where w.id = free.id and w.dead_at is null)
select ours.id, pg_catalog.set_config('synchronous_commit', 'off', true) from ours;
