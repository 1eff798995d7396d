-- What became of each lead: its id, which is the key of its run, and the state of that run.
-- Index: primary keys of keys and runs.
-- Locks: none.
select k.key::bigint, r.id, r.state
from stepwell.keys k
join stepwell.runs r on r.id = k.run_id
where k.workflow = 'welcome_lead'
