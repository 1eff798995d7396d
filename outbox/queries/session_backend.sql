-- Purpose: whether this session is served by another process than the one of which the client was told: that is a
-- connection pooler's doing. If so, what `pooled_settings` sets is set in the same statement, so that no session of the
-- pool bears the name under which the client has introduced itself.
-- Index: none. Locks: none.
select b.pooled,
       case when b.pooled then pg_catalog.set_config('timezone', 'UTC', false) end,
       case when b.pooled then pg_catalog.set_config('client_encoding', 'UTF8', false) end,
       case when b.pooled then pg_catalog.set_config('application_name', %(name)s, false) end
  from (select pg_catalog.pg_backend_pid() <> %(told)s::int as pooled) b;
