-- Purpose: settle what every connection of ours relies on, in one round trip right after connecting.
-- A server before 14, or on a platform that cannot watch its sockets, refuses the connection check:
-- a session without it works, it only notices later that its client has gone.
-- A role or database whose commits are not durable would break what is promised of recorded steps.
-- Index: none. Locks: none.
do $$
begin
  perform set_config('timezone', 'UTC', false);
  if current_setting('synchronous_commit') in ('off', 'local') then
    perform set_config('synchronous_commit', 'on', false);
  end if;
  begin
    perform set_config('client_connection_check_interval', '1s', false);
  exception when others then
    null;
  end;
end
$$;
