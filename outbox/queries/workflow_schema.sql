-- Purpose: what a workflow takes, as its workers have published it, in a version or the current one; no row if none has.
-- Index: primary key of workflows (name, version). Locks: none.
select w.input_schema::text
from stepwell.workflows w
where w.name = %(workflow)s::text
  and w.version = coalesce(%(version)s::text, stepwell.current_version(%(workflow)s::text));
