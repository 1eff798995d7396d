-- Ready what was set aside and is known here.
-- Index: tasks_set_aside.
-- Locks: shelved task rows (skip locked).
select stepwell.unshelve_v1(%s, %s, %s)
