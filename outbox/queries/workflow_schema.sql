-- Purpose: what a workflow takes, as its workers published it last, in one version if it is given; no row if none has.
-- Index: primary key of workflows (name, version). Locks: none.
select w.input_schema::text
from stepwell.workflows w
where w.name = %(workflow)s::text and (%(version)s::text is null or w.version = %(version)s::text)
order by w.seen_at desc
limit 1;
