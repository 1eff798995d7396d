-- Purpose: with which keys how many values of each table are sealed. A value holds the id of its key where nothing else can
--   stand: within a text, quotes are written with a backslash.
-- Index: none; every table is read. Locks: none.
select v.place, k.found[1] as key, count(*)
  from (select 'runs' as place, r.input::text as value from stepwell.runs r
        union all select 'runs', r.output::text from stepwell.runs r
        union all select 'runs', r.error::text from stepwell.runs r
        union all select 'outbox', o.value::text from stepwell.outbox o
        union all select 'outbox', o.error::text from stepwell.outbox o
        union all select 'tasks', t.args::text from stepwell.tasks t
        union all select 'signals', s.payload::text from stepwell.signals s
        union all select 'state', s.value::text from stepwell.state s
        union all select 'stream', s.value::text from stepwell.stream s) v
 cross join lateral regexp_matches(v.value, '"stepwell:sealed": ?\{"k": ?"([A-Za-z0-9._-]+)"', 'g') k (found)
 group by 1, 2
 order by 2, 1;
