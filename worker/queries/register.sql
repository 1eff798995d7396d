-- Make this worker known, so that it may claim.
-- Index: workers' primary key; tasks_set_aside for what was shelved.
-- Locks: shelved task rows (skip locked).
select stepwell.register_v1(%s, %s, %s, %s, %s, %s, %s)
