-- Purpose: let what is recorded be replayed with other arguments: some were made of times, which have been moved.
-- Index: none; all of a test's outbox is read.
-- Locks: the rows of outbox that have a fingerprint.
update stepwell.outbox set fingerprint = null where fingerprint is not null;
