"""What each role can do with each thing in the schema: everything there has been decided on, and nothing else is granted.

The lists below are the decisions. A table, sequence, type or function that comes later fails here until it stands in one
of them; what the catalogue says of grants is then compared with them, and the roles try.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from tests.security.members import ROLES, Db, Member, member_of

FOR_PRODUCERS = frozenset({"enqueue", "enqueue_many", "signal", "cancel", "current_version"})
"""What a service may call, in its own transaction. All of it runs with the owner's rights, nothing else does."""

FOR_OPERATORS = frozenset(
    {"retry", "rewind", "fork", "resolve", "pause", "pause_many", "resume", "resume_many", "forget"}
)
"""What repairs runs. It reads histories and locks tasks, so that it takes the rights of a worker."""

INTERNAL = frozenset(
    {
        "new_id", "ring", "claimed_as", "wake", "standing", "undone", "at_or_after", "reopen", "has_come_to",
        "comes_after", "resume_calls", "noted_cancelled", "is_cancelled", "has_only_continued", "beyond", "family_of", "refuse_forgotten", "forgotten_fault", "poisoned", "has_mail",
        "size_of", "fits", "require_trace",
    }
)  # fmt: skip
"""What the others are made of."""

CLAIMANTS = "_v1"
"""How the name of each function of the claimants' protocol ends."""

TABLES = frozenset(
    {
        "runs", "keys", "tasks", "outbox", "signals", "state", "stream", "workers", "workflows", "counters",
        "doorbell", "exporter", "migrations",
    }
)  # fmt: skip
VIEWS = frozenset({"run_status", "supervised"})
SEQUENCES = frozenset({"turns", "tasks_id_seq", "signals_id_seq"})

READ_BY_PRODUCERS = frozenset({"workflows"})
"""To check a name and an input before they are enqueued. It holds no payload."""
NOT_WRITTEN_BY_WORKERS = frozenset({"migrations"}) | VIEWS

WRITES = frozenset({"INSERT", "UPDATE", "DELETE"})
RELATION_RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER")
COLUMN_RIGHTS = ("SELECT", "INSERT", "UPDATE", "REFERENCES")
SEQUENCE_RIGHTS = ("USAGE", "SELECT", "UPDATE")


def kind_of(function: str) -> str:
    """Return which decision covers a function; fail the test if none does."""
    found = [
        kind
        for kind, names in (
            ("producers", FOR_PRODUCERS),
            ("operators", FOR_OPERATORS),
            ("internal", INTERNAL),
        )
        if function in names
    ]
    if function.endswith(CLAIMANTS):
        found.append("claimants")
    assert len(found) == 1, f"decide in {__name__} who may call stepwell.{function}: {found}"
    return found[0]


def functions(db: Db) -> list[tuple[int, str, str]]:
    """Return (oid, name, a call of it with nulls) for every function of the schema."""
    rows = db.execute(
        """select p.oid, p.proname, format('stepwell.%I(%s)', p.proname,
                  (select string_agg(format('null::%s', format_type(a, null)), ', ' order by i)
                   from unnest(p.proargtypes) with ordinality as u (a, i)))
           from pg_proc p where p.pronamespace = 'stepwell'::regnamespace order by p.proname"""
    ).fetchall()
    return [(oid, name, call) for oid, name, call in rows]


def relations(db: Db, kinds: str) -> list[str]:
    rows = db.execute(
        "select relname from pg_class where relnamespace = 'stepwell'::regnamespace and relkind::text = any (%s)",
        [list(kinds)],
    )
    return sorted(name for (name,) in rows)


def granted(db: Db, role: str, relation: str) -> set[str]:
    """Return what the catalogue lets a role do with a relation, on the whole of it or on one column."""
    rows = db.execute(
        """select p from unnest(%s::text[]) p where has_table_privilege(%s, 'stepwell.' || %s, p)
           union select p from unnest(%s::text[]) p where has_any_column_privilege(%s, 'stepwell.' || %s, p)""",
        [list(RELATION_RIGHTS), role, relation, list(COLUMN_RIGHTS), role, relation],
    )
    return {right for (right,) in rows}


@pytest.fixture
def producer(database_url: str, db: Db) -> Iterator[Member]:
    with member_of("stepwell_producer", database_url, db) as member:
        yield member


@pytest.fixture
def viewer(database_url: str, db: Db) -> Iterator[Member]:
    with member_of("stepwell_viewer", database_url, db) as member:
        yield member


@pytest.fixture
def worker(database_url: str, db: Db) -> Iterator[Member]:
    with member_of("stepwell_worker", database_url, db) as member:
        yield member


@pytest.fixture
def stranger(database_url: str, db: Db) -> Iterator[Member]:
    with member_of(None, database_url, db) as member:
        yield member


# -- what the catalogue says ---------------------------------------------------------------------------


def test_everything_in_the_schema_was_decided_on(db: Db) -> None:
    assert set(relations(db, "rpf")) == TABLES
    assert set(relations(db, "vm")) == VIEWS
    assert set(relations(db, "S")) == SEQUENCES
    names = {name for _, name, _ in functions(db)}
    assert all(kind_of(name) for name in names)
    assert names >= FOR_PRODUCERS | FOR_OPERATORS | INTERNAL, "a decision about nothing"


def test_public_has_nothing(db: Db) -> None:
    """New functions are everybody's unless somebody takes them back: the catalogue is asked, not schema.sql."""
    rows = db.execute(
        """select 'schema', n.nspname, a.privilege_type from pg_namespace n, aclexplode(n.nspacl) a
           where n.nspname = 'stepwell' and a.grantee = 0
           union all
           select 'function', p.proname, a.privilege_type
           from pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
           where p.pronamespace = 'stepwell'::regnamespace and a.grantee = 0
           union all
           select 'relation', c.relname, a.privilege_type
           from pg_class c, aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) a
           where c.relnamespace = 'stepwell'::regnamespace and a.grantee = 0
           union all
           select 'column', c.relname || '.' || t.attname, a.privilege_type
           from pg_class c join pg_attribute t on t.attrelid = c.oid, aclexplode(t.attacl) a
           where c.relnamespace = 'stepwell'::regnamespace and a.grantee = 0"""
    ).fetchall()
    assert rows == []


def test_nothing_is_granted_to_come_and_nothing_may_be_handed_on(db: Db) -> None:
    """No default privileges in the schema, and no grant option: who has a role cannot give its rights away."""
    row = db.execute(
        """select (select count(*) from pg_default_acl d where d.defaclnamespace = 'stepwell'::regnamespace),
                  (select count(*) from pg_proc p, aclexplode(p.proacl) a
                   where p.pronamespace = 'stepwell'::regnamespace and a.is_grantable and a.grantee <> p.proowner),
                  (select count(*) from pg_class c, aclexplode(c.relacl) a
                   where c.relnamespace = 'stepwell'::regnamespace and a.is_grantable and a.grantee <> c.relowner)"""
    ).fetchone()
    assert row == (0, 0, 0)


def test_our_roles_are_nothing_but_bundles_of_rights(db: Db) -> None:
    rows = db.execute(
        """select rolname from pg_roles
           where rolname = any (%s) and not (rolsuper or rolcreaterole or rolcreatedb or rolcanlogin or rolreplication
                                             or rolbypassrls)""",
        [list(ROLES)],
    ).fetchall()
    assert {name for (name,) in rows} == set(ROLES)
    assert db.execute(
        "select count(*) from pg_auth_members where member = any (array(select oid from pg_roles where rolname = any (%s)))",
        [list(ROLES)],
    ).fetchone() == (0,)


def test_who_may_call_each_function_is_what_was_decided(db: Db) -> None:
    for oid, name, _ in functions(db):
        may = {
            role
            for role in ROLES
            if db.execute("select has_function_privilege(%s, %s::oid, 'execute')", [role, oid]).fetchone()
            == (True,)
        }
        wanted = {"stepwell_worker"}
        if kind_of(name) == "producers":
            wanted.add("stepwell_producer")
        assert may == wanted, name


def test_what_each_role_may_do_with_each_relation_is_what_was_decided(db: Db) -> None:
    for name in relations(db, "rpfvm"):
        reads = {"SELECT"}
        assert granted(db, "stepwell_producer", name) == (reads if name in READ_BY_PRODUCERS else set()), name
        assert granted(db, "stepwell_viewer", name) == reads, name
        written = set() if name in NOT_WRITTEN_BY_WORKERS - VIEWS else WRITES
        assert granted(db, "stepwell_worker", name) == reads | written, name
    for name in relations(db, "S"):
        for role in ROLES:
            rows = db.execute(
                "select p from unnest(%s::text[]) p where has_sequence_privilege(%s, 'stepwell.' || %s, p)",
                [list(SEQUENCE_RIGHTS), role, name],
            )
            wanted = {"USAGE"} if role == "stepwell_worker" else set()
            assert {right for (right,) in rows} == wanted, (role, name)


def test_only_what_producers_call_runs_with_the_owners_rights(db: Db) -> None:
    rows = db.execute(
        "select proname from pg_proc where pronamespace = 'stepwell'::regnamespace and prosecdef"
    ).fetchall()
    assert {name for (name,) in rows} == FOR_PRODUCERS


# -- what happens when they try -------------------------------------------------------------------------


def attempts(relation: str, column: str) -> dict[str, str]:
    """Return every way to write to a relation, or to hold it up."""
    return {
        "insert": f"insert into stepwell.{relation} default values",
        "insert nothing": f"insert into stepwell.{relation} overriding system value select * from stepwell.{relation} where false",
        "update": f"update stepwell.{relation} set {column} = default",
        "update nothing": f"update stepwell.{relation} set {column} = default where false",
        "delete": f"delete from stepwell.{relation}",
        "truncate": f"truncate stepwell.{relation}",
        "merge": f"merge into stepwell.{relation} t using (select 1) s on true when matched then delete",
        "lock": f"lock table stepwell.{relation} in access exclusive mode",
        "copy in": f"copy stepwell.{relation} from stdin",
        "trigger": f"create trigger mine before insert on stepwell.{relation} execute function suppress_redundant_updates_trigger()",
        "rule": f"create rule mine as on insert to stepwell.{relation} do instead nothing",
        "index": f"create index on stepwell.{relation} ({column})",
        "alter": f"alter table stepwell.{relation} add column mine int",
        "drop": f"drop table stepwell.{relation}",
        "comment": f"comment on table stepwell.{relation} is 'mine'",
        "inherit": f"create temp table mine () inherits (stepwell.{relation})",
        "vacuum": f"analyze stepwell.{relation}",
    }


@contextmanager
def in_transaction(db: Db) -> Iterator[None]:
    """Roll back what was done, whatever became of it."""
    with db.transaction(force_rollback=True):
        yield


def tries(member: Member, statement: str) -> str:
    """Return what a statement comes to: refused, error, or done. It is rolled back."""
    try:
        with in_transaction(member.db):
            if statement.startswith("copy"):
                with member.db.cursor().copy(statement.encode()):
                    pass
            else:
                member.db.execute(statement.encode())
    except psycopg.errors.InsufficientPrivilege:
        return "refused"
    except psycopg.errors.WrongObjectType:  # of a view: there is nothing like it
        return "refused"
    except psycopg.Error as error:
        return f"error: {error}"
    return "done"


def is_untouched(member: Member, how: str, statement: str) -> bool:
    """Tell whether an attempt has been refused. ANALYZE only warns, and skips the table."""
    if how == "vacuum":
        heard: list[str] = []
        member.db.add_notice_handler(lambda notice: heard.append(notice.message_primary or ""))
        member.db.execute(statement.encode())
        return any("permission denied" in said for said in heard)
    return tries(member, statement) == "refused"


@pytest.mark.parametrize("role", ["stepwell_producer", "stepwell_viewer"])
def test_who_only_produces_or_looks_writes_to_nothing_and_holds_nothing_up(
    role: str, database_url: str, db: Db
) -> None:
    db.execute("select stepwell.enqueue('w', key => 'k')")
    with member_of(role, database_url, db) as member:
        for relation in relations(db, "rpf"):
            row = db.execute(
                "select attname from pg_attribute where attrelid = ('stepwell.' || %s)::regclass and attnum = 1",
                [relation],
            ).fetchone()
            assert row is not None
            for how, statement in attempts(relation, row[0]).items():
                assert is_untouched(member, how, statement), (role, how, statement, tries(member, statement))
        for sequence in relations(db, "S"):
            for statement in (f"nextval('stepwell.{sequence}')", f"setval('stepwell.{sequence}', 1)"):
                assert tries(member, f"select {statement}") == "refused", statement
        for statement in (
            "create table stepwell.mine (a int)",
            "create function stepwell.mine() returns int language sql as 'select 1'",
            "create or replace function stepwell.cancel(run uuid) returns boolean language sql as 'select true'",
            "alter function stepwell.cancel(uuid) set search_path = pg_temp",
            "alter function stepwell.cancel(uuid) owner to current_user",
            "drop schema stepwell cascade",
            "alter schema stepwell rename to mine",
            f"grant {role} to pg_monitor",
            "set role stepwell_worker",
            "set session authorization postgres",
            "alter table stepwell.doorbell disable trigger all",
        ):
            assert tries(member, statement) == "refused", statement


def test_a_producer_calls_nothing_but_its_own_functions(producer: Member, db: Db) -> None:
    for _, name, call in functions(db):
        if name not in FOR_PRODUCERS:
            assert tries(producer, f"select {call}") == "refused", name
            assert tries(producer, f"select * from {call}") == "refused", name


def test_a_viewer_calls_nothing(viewer: Member, db: Db) -> None:
    for _, name, call in functions(db):
        assert tries(viewer, f"select {call}") == "refused", name


def test_a_stranger_reads_writes_and_calls_nothing(stranger: Member, db: Db) -> None:
    for _, name, call in functions(db):
        assert tries(stranger, f"select {call}") == "refused", name
    for relation in relations(db, "rpfvm"):
        assert tries(stranger, f"select * from stepwell.{relation}") == "refused", relation


SECRET = "a-secret-in-a-payload"


def test_a_producer_sees_no_payload_by_any_way_to_read(producer: Member, db: Db) -> None:
    """Not from tables and views, by COPY, as statistics of the planner, in other sessions' queries, nor as a sequence."""
    key, label = f"key of {SECRET}", f'{{"l": "{SECRET}"}}'
    for _ in range(200):  # enough of the same for the planner to take note of
        db.execute("select stepwell.enqueue('w', %s, labels => %s)", [f'{{"a": "{SECRET}"}}', label])
    row = db.execute("select stepwell.enqueue('w', key => %s)", [key]).fetchone()
    assert row is not None
    run = row[0]
    db.execute("select stepwell.signal(%s, 'go', %s)", [run, f'"{SECRET}"'])
    db.execute(
        "insert into stepwell.outbox (run_id, epoch, path, n, seq, kind, name, outcome, value)"
        " values (%s, 0, '{1}', 0, 1, 'step', 's', 'completed', %s)",
        [run, f'"{SECRET}"'],
    )
    db.execute("insert into stepwell.state values (%s, 'k', %s)", [run, f'"{SECRET}"'])
    db.execute("insert into stepwell.stream values (%s, 0, 1, 'log', %s)", [run, f'"{SECRET}"'])
    db.execute("analyze")
    # Sessions keep their last statement; this one of the owner's holds the secret while the producer looks.
    db.execute(f"select '{SECRET}'".encode())

    for relation in sorted({*relations(db, "rpfvm")} - READ_BY_PRODUCERS):
        for statement in (
            f"select * from stepwell.{relation}",
            f"select count(*) from stepwell.{relation}",
            f"select from stepwell.{relation} limit 1",
            f"table stepwell.{relation}",
            f"explain analyze select from stepwell.{relation}",
        ):
            assert tries(producer, statement) == "refused", statement
        with (
            in_transaction(producer.db),
            pytest.raises(psycopg.errors.InsufficientPrivilege),
            producer.db.cursor().copy(f"copy stepwell.{relation} to stdout".encode()) as copying,
        ):
            list(copying)
    everything = [
        row
        for statement in (
            "select s::text from pg_stats s",
            "select s::text from pg_stats_ext s",
            "select s::text from pg_stat_activity s",
            "select s::text from pg_sequences s where schemaname = 'stepwell' and last_value is not null",
            "select s::text from pg_prepared_statements s",
            "select w::text from stepwell.workflows w",
        )
        for row in producer.db.execute(statement.encode())
    ]
    assert everything  # its own session and the catalogue's statistics, at least
    assert not [row for row in everything if SECRET in row[0] or "stepwell" in row[0].split(",")[0]]
    assert producer.is_refused("select * from pg_statistic")


def test_a_producer_forges_no_completion(producer: Member, db: Db) -> None:
    """Neither as a row, nor by a flush, nor by ending a run, nor by claiming it, nor as a worker that it makes up."""
    run = producer.one("select stepwell.enqueue('w')")
    for statement in (
        f"insert into stepwell.outbox values ('{run}', 0, '{{1}}', 0, 1, 'step', 's', null, 'completed', '1')",
        f"update stepwell.runs set state = 'succeeded', finished_at = now(), output = '1' where id = '{run}'",
        "insert into stepwell.workers (id, host, pid, queues, names) values (1, 'h', 1, '{default}', '{w}')",
        "select stepwell.register_v1(1, null, 'h', 1, '', '{default}', '{w}')",
        "select * from stepwell.claim_v1(1, 'default', '{w}', 1, array_fill(0::bigint, array[20]))",
        "select stepwell.flush_v1(1, '[]', '[]', '[]')",
        "select stepwell.commit_step_v1(1, '[]', '[]', '[]', '[]', '')",
        "select stepwell.end_v1(1, '{1}', 'succeeded', null)",
        f"select stepwell.resolve('{run}', '{{1}}', '1')",
        f"select stepwell.wake('{run}', 'cancel', '{{}}')",
        "insert into stepwell.workflows values ('w', '9', '{}')",
    ):
        assert tries(producer, statement) == "refused", statement
    assert db.execute("select state from stepwell.runs where id = %s", [run]).fetchone() == ("open",)


@pytest.mark.parametrize("name", ["stepwell:child:1", "stepwell:", "stepwell:child"])
def test_a_producer_forges_no_result_of_a_child(producer: Member, name: str) -> None:
    run = producer.one("select stepwell.enqueue('w')")
    result = '{"run": "x", "state": "succeeded", "output": 1}'
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="not begin with"):
        producer.db.execute("select stepwell.signal(%s, %s, %s)", [run, name, result])
