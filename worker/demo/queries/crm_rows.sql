-- How often each lead is in the CRM.
-- Index: none; every row of the demo is counted.
-- Locks: none.
select lead_id, count(*)
from crm.leads
group by lead_id
