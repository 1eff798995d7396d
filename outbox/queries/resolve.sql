-- Purpose: say how a step of a blocked or failed run ended. One row (new epoch or null, the state before, the first step
--   that was undone), none for an unknown run.
-- Index: primary keys of runs and outbox. Locks: the run's row, which no claimant holds while the run has no task.
select e.epoch, r.state, case when e.epoch is null then stepwell.undone(r.id) end
from stepwell.runs r, stepwell.resolve(r.id, %(path)s::int[], %(value)s::json, %(error)s::json) e (epoch)
where r.id = %(run)s::uuid;
