-- Purpose: end one backend. Needs the same role, or pg_signal_backend (42501).
-- Index: none. Locks: none.
select pg_catalog.pg_terminate_backend(%s);
