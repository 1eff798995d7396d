-- Bind the completion of a transactional step to the user's own transaction.
-- Index: as flush_v1.
-- Locks: as flush_v1, from here to the COMMIT that follows in the same round trip.
select stepwell.commit_step_v1(%(worker)s, %(transitions)s, %(records)s, %(ends)s, %(extras)s, %(canary)s)
