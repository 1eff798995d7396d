-- Purpose: the runs whose id begins with a given text, the first few of them.
-- Index: primary key of runs, a range of it. Locks: none.
select id::text
  from stepwell.runs
 where id between %(lowest)s::uuid and %(highest)s::uuid
 order by id
 limit %(limit)s;
