-- Write down what happened, for many tasks in one transaction.
-- Index: tasks' primary key; outbox's primary key.
-- Locks: task rows in order of id, then counters in order of their key.
select stepwell.flush_v1(%s, %s, %s, %s, %s)
