-- Purpose: as reset_session, in one statement that fits into a pipeline: for a session that goes back to a pooler.
-- `pooled_settings` has to follow.
-- Index: none. Locks: gives back the session's own.
do $$
begin
  reset session authorization;
  reset role;
  reset all;
  perform pg_catalog.pg_advisory_unlock_all();
  unlisten *;
  execute 'close all';
  discard temp;
end
$$;
