-- Purpose: what a workflow takes, as its workers published it last; no row if none has.
-- Index: primary key of workflows (name, version). Locks: none.
select w.input_schema::text
from stepwell.workflows w
where w.name = %(workflow)s::text
order by w.seen_at desc
limit 1;
