-- Purpose: no task has a priority that nobody claims. Claims look at 0 to 9; an `update` by hand to another one hid a task
--   for good, without a word. What was hidden comes back as the first or the last. The rows that are there are checked by
--   the next migration, which keeps nobody out.
-- Transaction: one.
-- Locks: tasks.

update stepwell.tasks set priority = case when priority < 0 then 0 else 9 end where priority not between 0 and 9;

alter table stepwell.tasks add constraint tasks_priority_range check (priority between 0 and 9) not valid;
