-- Purpose: undo whatever user code has set, locked or made in a session, before somebody else gets it. Prepared
-- statements stay: the driver counts on them. `session_settings` has to follow.
-- Index: none. Locks: gives back the session's own.
reset session authorization;
reset role;
reset all;
select pg_catalog.pg_advisory_unlock_all();
unlisten *;
close all;
discard temp;
