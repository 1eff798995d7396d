-- Purpose: the exact totals of run ends, step outcomes and workers declared dead, added up over the shards.
-- Index: none; the table holds at most 64 rows for each (kind, name, outcome).
-- Locks: none.
select kind, name, outcome, sum(value)::bigint
  from stepwell.counters
 group by kind, name, outcome
 order by kind, name, outcome;
