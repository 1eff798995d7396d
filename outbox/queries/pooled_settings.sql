-- Purpose: what every connection of ours relies on, behind a connection pooler, set anew in a session that was reset: only what the server reports to its client
-- whenever it changes, which is what a pooler can carry from one session to the next. Anything else would be set for
-- whoever gets this session after us; that commits are durable is seen to by those who commit.
-- Index: none. Locks: none.
select pg_catalog.set_config('timezone', 'UTC', false),
       pg_catalog.set_config('client_encoding', 'UTF8', false),
       pg_catalog.set_config('application_name', %(name)s, false);
