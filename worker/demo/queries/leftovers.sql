-- How many tasks are left; none when everything has ended.
-- Index: none; the table is empty when all is well.
-- Locks: none.
select count(*)
from stepwell.tasks
