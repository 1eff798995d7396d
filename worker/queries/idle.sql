-- Lease the doorbell of these queues: producers ring meanwhile.
-- Index: doorbell's primary key.
-- Locks: the worker's own doorbell rows, sorted by queue.
select stepwell.idle_v1(%s, %s, %s)
