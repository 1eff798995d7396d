-- The runs with executions that gave no result: how many of send_welcome, and how many were interrupted.
-- Index: none; every record of the demo is looked at.
-- Locks: none.
select run_id,
       count(*) filter (where name = 'send_welcome')    as unanswered_sends,
       count(*) filter (where outcome = 'interrupted')  as interrupted
from stepwell.outbox
where kind = 'step' and n >= 1
group by run_id
