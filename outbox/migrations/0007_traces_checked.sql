-- Purpose: what the migration before has said of new rows holds of all. Nobody waits for it, however long it reads.
-- Transaction: one.
-- Locks: runs, signals.

alter table stepwell.runs validate constraint runs_trace_short;
alter table stepwell.signals validate constraint signals_trace_short;
