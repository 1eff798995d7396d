-- Purpose: settle what every connection of ours relies on, in one round trip right after connecting.
-- A server before 14, or on a platform that cannot watch its sockets, refuses the connection check:
-- a session without it works, it only notices later that its client has gone.
-- Index: none. Locks: none.
do $$
begin
  perform set_config('timezone', 'UTC', false);
  begin
    perform set_config('client_connection_check_interval', '1s', false);
  exception when others then
    null;
  end;
end
$$;
