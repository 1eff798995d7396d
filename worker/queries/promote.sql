-- Ready what is due; how many, and in how many seconds the next is due.
-- Index: tasks_due.
-- Locks: due task rows (skip locked).
select promoted, next_in from stepwell.promote_v1(%s)
