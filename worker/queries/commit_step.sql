-- Bind the completion of a transactional step to the user's own transaction.
-- Index: as flush_v1.
-- Locks: as flush_v1, from here to the COMMIT that follows in the same pipeline.
select stepwell.commit_step_v1(%s, %s, %s, %s, %s, %s)
