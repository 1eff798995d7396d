-- Purpose: say that these workers' supervisor lives; answers which of them the database knows as alive. A row that
-- somebody holds is left out this time, so that one lock never stops the beats of all. The beat of a buried worker
-- stands still, so that a reclaim that was cut short is taken up by another observer.
-- Index: workers' primary key.
-- Locks: the workers' rows (no key update, skip locked; a claim's key share is no obstacle).
with ours as materialized (
    select w.id from stepwell.workers w where w.id = any (%s) and w.dead_at is null),
free as materialized (
    select w.id from ours join stepwell.workers w on w.id = ours.id for no key update of w skip locked),
beaten as (
    update stepwell.workers w set beat = w.beat + 1 from free where w.id = free.id and w.dead_at is null)
select ours.id from ours;
