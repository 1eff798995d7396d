-- A drained worker leaves. A claim that it still holds keeps the row, for a reclaim.
-- Index: workers' primary key, tasks_claimed.
-- Locks: the worker's own rows.
with silent as (delete from stepwell.doorbell d where d.worker = %(me)s)
delete from stepwell.workers w
where w.id = %(me)s
  and not exists (select from stepwell.tasks t where t.state = 'claimed' and t.claimed_by = %(me)s)
