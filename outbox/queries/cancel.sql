-- Purpose: ask for the end of a run; answers whether it was open.
-- Index: primary key of runs, inside the function. Locks: none; a wake task is inserted (I15).
select stepwell.cancel(%(run)s::uuid);
