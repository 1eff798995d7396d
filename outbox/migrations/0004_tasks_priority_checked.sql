-- Purpose: check the priorities of the tasks that were there before: all of them are read, while everybody works on.
-- Transaction: one.
-- Locks: tasks.

alter table stepwell.tasks validate constraint tasks_priority_range;
