-- The live workers, the one with the most claims first.
-- Index: tasks_claimed.
-- Locks: none.
select w.id, w.pid, count(t.id) as claims
from stepwell.workers w
left join stepwell.tasks t on t.claimed_by = w.id and t.state = 'claimed'
where w.dead_at is null
group by w.id, w.pid
order by claims desc, w.id
