-- Purpose: what an observer sees of every worker: its beat, whether it was buried already, whether its supervisor holds
-- its advisory lock, and whether it has a session to hold it in.
-- Index: none, a row for each worker process; pg_locks and pg_stat_activity are read once.
-- Locks: none.
select w.id, w.beat, w.dead_at is not null, w.id in (select s.worker from stepwell.supervised s), w.host, w.pid, w.locking
  from stepwell.workers w
 order by w.id;
