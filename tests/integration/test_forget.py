"""Forgetting a key: what came in under it is nowhere any more, what happened is still told, and nothing goes on."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
import pytest_asyncio
from click.testing import CliRunner, Result
from psycopg.rows import TupleRow

from outbox import Client, PayloadError, RunConflict
from outbox.database import connect
from tests.engines import Lab, until
from tests.scanning import places_of
from tests.waiting import wait_until
from worker import (
    continue_as,
    emit,
    gather,
    set_state,
    start,
    step,
    wait_signal,
    workflow,
)
from worker.cli import main
from worker.definitions import Registry, collecting

Db = psycopg.Connection[TupleRow]
Command = Callable[..., Result]

SECRET = "xylophone"
EMAIL = f"{SECRET}@example.com"


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


@pytest.fixture
def client(database_url: str) -> Iterator[Client]:
    with Client(database_url) as opened:
        yield opened


@pytest.fixture
def stepwell(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPWELL_DATABASE_URL", database_url)

    def run(*arguments: str, input: str | None = None) -> Result:
        result = CliRunner().invoke(main, arguments, input=input, catch_exceptions=False)
        assert "Traceback" not in result.stderr
        return result

    return run


def carrying() -> Registry:
    """Workflows that leave the secret wherever something can be left."""
    with collecting() as registry:

        @step
        async def note(word: str) -> str:
            return f"noted {word}"

        @step
        async def refuse(word: str) -> None:
            raise ValueError(f"no {word}")

        @workflow
        async def child(word: str) -> str:
            emit("log", word)
            return await note(word)

        @workflow
        async def left_behind(word: str) -> str:
            return await wait_signal("go", type=str)

        @workflow
        async def top(word: str, turn: int = 1) -> list[str]:
            set_state("word", word)
            emit("log", word)
            both = [*await gather(note(word), child(word))]
            heard = await wait_signal("go", type=str)
            if turn == 1:
                continue_as(word, 2)
            try:
                await refuse(word)
            except Exception as error:
                both.append(str(error))
            return [*both, heard]

        @workflow
        async def failing(word: str) -> None:
            start(left_behind, word, detached=True)
            await refuse(word)

        @workflow
        async def blocked(word: str) -> None:
            await note(word)
            raise_not_deterministic(word)

    return registry


def raise_not_deterministic(word: str) -> None:
    from outbox import NotDeterministic

    raise NotDeterministic(word)


async def has_ended(lab: Lab, client: Client, workflow: str, *signals: str, key: str = EMAIL) -> UUID:
    run = client.enqueue(
        workflow, word=SECRET, key=key, labels={"for": SECRET}, lane=SECRET, tenant=f"the company {SECRET}"
    )
    for each in signals:
        client.signal(run.id, "go", each)
    await lab.ended(run.id)
    return run.id


async def test_what_came_in_under_a_key_is_nowhere_any_more_and_what_happened_is_still_told(
    lab: Lab, client: Client, db: Db
) -> None:
    async with lab.engine(carrying()):
        run = await has_ended(lab, client, "top", f"go {SECRET}", f"again {SECRET}", f"too late {SECRET}")
        bystander = await has_ended(lab, client, "child", key="somebody else")
    assert len(places_of(db, SECRET)) > 20
    before = {each.seq: (each.name, each.outcome, each.path, each.at) for each in client.history(run)}
    forgotten = client.forget(EMAIL)
    assert len(forgotten) == 3
    assert run in forgotten
    assert bystander not in forgotten
    assert client.result(bystander) == f"noted {SECRET}"
    left = {place: row for place, row in places_of(db, SECRET).items() if str(bystander) not in row}
    assert left == {}
    after = {each.seq: (each.name, each.outcome, each.path, each.at) for each in client.history(run)}
    assert after == before
    assert {each.error["message"] for each in client.history(run) if each.error} == {"forgotten"}
    assert {each.fingerprint for each in client.history(run)} == {None}
    info = client.get(run)
    assert (info.status, info.input, info.key, info.labels) == (
        "succeeded",
        {"stepwell:forgotten": True},
        None,
        {},
    )
    with pytest.raises(RunConflict, match="was forgotten"):
        client.result(run)
    assert client.state(run) == {}
    assert list(client.stream(run)) == []


async def test_the_key_is_free_again(lab: Lab, client: Client) -> None:
    async with lab.engine(carrying()):
        first = await has_ended(lab, client, "child")
        assert client.enqueue("child", word="x", key=EMAIL).id == first
        assert client.forget(EMAIL) == [first]
        again = client.enqueue("child", word="x", key=EMAIL)
        assert again.created
        assert again.id != first
        await lab.ended(again.id)
    assert client.forget(EMAIL) == [again.id]
    assert client.forget(EMAIL) == []


async def test_a_key_is_forgotten_for_one_workflow_or_for_all(lab: Lab, client: Client) -> None:
    async with lab.engine(carrying()):
        child = await has_ended(lab, client, "child")
        failing = await has_ended(lab, client, "failing")
        left = client.list("left_behind")[0]
        client.cancel(left.id)
        await lab.ended(left.id)
    assert client.forget(EMAIL, workflow="child") == [child]
    assert sorted(client.forget(EMAIL)) == sorted([failing, left.id])
    with pytest.raises(PayloadError):
        client.forget("")


async def test_a_run_that_is_open_is_not_forgotten_nor_anything_beside_it(
    lab: Lab, client: Client, db: Db
) -> None:
    async with lab.engine(carrying()):
        failing = await has_ended(lab, client, "failing")
        left = client.list("left_behind")[0]
        await lab.waits(left.id)
        before = places_of(db, SECRET)
        with pytest.raises(RunConflict, match=f"run {left.id} is open"):
            client.forget(EMAIL)
        assert str(failing) in "".join(before.values())
        assert places_of(db, SECRET) == before


async def test_a_child_is_not_forgotten_while_its_parent_holds_its_result(lab: Lab, client: Client) -> None:
    async with lab.engine(carrying()):
        run = await has_ended(lab, client, "top", "go", "go")
    child = next(each for each in client.list("child") if each.key is not None)
    with pytest.raises(RunConflict, match=f"was called by run {run}"):
        client.forget(str(child.key))


async def test_forks_hold_copies_and_are_forgotten_as_well(lab: Lab, client: Client, db: Db) -> None:
    async with lab.engine(carrying()):
        run = await has_ended(lab, client, "child")
        fork = client.fork(run, 1)
        await lab.ended(fork)
        of_fork = client.fork(fork, 1, input={"word": f"another {SECRET}"})
        await lab.ended(of_fork)
    assert set(client.forget(EMAIL)) == {run, fork, of_fork}
    assert places_of(db, SECRET) == {}


async def test_who_forks_a_run_just_then_waits_and_is_refused(
    lab: Lab, client: Client, database_url: str
) -> None:
    async with lab.engine(carrying()):
        run = await has_ended(lab, client, "child")
    said: list[Exception] = []

    def fork() -> None:
        with Client(database_url) as other:
            try:
                other.fork(run, 1)
            except RunConflict as error:
                said.append(error)

    forking = threading.Thread(target=fork)
    with connect(database_url, application_name="test", autocommit=False) as forgetting:
        assert forgetting.execute("select stepwell.forget(%s)", [EMAIL]).fetchone() == ([run],)
        forking.start()
        with connect(database_url, application_name="test") as looking:
            waits = (
                "select count(*) = 1 from pg_stat_activity where datname = current_database()"
                " and wait_event_type = 'Lock' and query like '%stepwell.fork%'"
            )
            wait_until(lambda: looking.execute(waits).fetchone() == (True,))
        forgetting.commit()
    forking.join()
    assert "was forgotten" in str(said[0])


async def test_a_signal_that_commits_after_the_run_was_forgotten_is_forgotten_as_well(
    lab: Lab, client: Client, db: Db, database_url: str
) -> None:
    async with lab.engine(carrying()):
        run = client.enqueue("left_behind", word=SECRET, key=EMAIL)
        await lab.waits(run.id)
        with connect(database_url, application_name="test", autocommit=False) as late:
            assert client.signal(run.id, "go", SECRET, tx=late)
            run.cancel()
            await lab.ended(run.id)
            assert client.forget(EMAIL) == [run.id]
            assert places_of(db, SECRET) == {}
            late.commit()
        await until(lambda: nothing_left_to_do(db), what="what is told to forgotten runs")
    assert places_of(db, SECRET) == {}


async def test_a_signal_that_commits_while_the_run_is_being_forgotten_is_forgotten_as_well(
    lab: Lab, client: Client, db: Db, database_url: str
) -> None:
    """Its own wake is applied by a worker that cannot know of it yet."""
    async with lab.engine(carrying()):
        run = client.enqueue("left_behind", word=SECRET, key=EMAIL)
        await lab.waits(run.id)
        with (
            connect(database_url, application_name="test", autocommit=False) as late,
            connect(database_url, application_name="test", autocommit=False) as forgetting,
        ):
            assert client.signal(run.id, "go", SECRET, tx=late)
            run.cancel()
            await lab.ended(run.id)
            await until(lambda: nothing_left_to_do(db), what="the cancellation")
            assert forgetting.execute("select stepwell.forget(%s)", [EMAIL]).fetchone() == ([run.id],)
            late.commit()
            await until(lambda: nothing_left_to_do(db), what="the signal's own wake")
            forgetting.commit()
        await until(lambda: nothing_left_to_do(db), what="what is told to forgotten runs")
    assert places_of(db, SECRET) == {}


async def test_a_late_signal_to_a_run_that_has_ended_is_there_for_its_retry(
    lab: Lab, client: Client, db: Db, database_url: str
) -> None:
    async with lab.engine(carrying()):
        run = client.enqueue("left_behind", word=SECRET, key=EMAIL)
        await lab.waits(run.id)
        with connect(database_url, application_name="test", autocommit=False) as late:
            assert client.signal(run.id, "go", "after all", tx=late)
            run.cancel()
            await lab.ended(run.id)
            late.commit()
        await until(lambda: nothing_left_to_do(db), what="the signal's wake")
        client.retry(run.id)
        assert await lab.succeeded(run.id) == "after all"


async def nothing_left_to_do(db: Db) -> bool:
    return db.execute("select count(*) from stepwell.tasks").fetchone() == (0,)


async def test_a_blocked_run_is_cancelled_and_forgotten(lab: Lab, client: Client, db: Db) -> None:
    async with lab.engine(carrying()):
        run = await has_ended(lab, client, "blocked")
    assert client.get(run).status == "blocked"
    assert client.forget(EMAIL) == [run]
    assert client.get(run).status == "cancelled"
    assert places_of(db, SECRET) == {}
    counted = db.execute(
        "select outcome, sum(value)::int from stepwell.counters where kind = 'run' group by 1 order by 1"
    ).fetchall()
    recorded = db.execute(
        "select outcome, count(*)::int from stepwell.outbox where kind = 'run' group by 1 order by 1"
    ).fetchall()
    assert counted == recorded == [("blocked", 1), ("cancelled", 1)]


async def test_a_forgotten_run_cannot_go_on(lab: Lab, client: Client) -> None:
    async with lab.engine(carrying()):
        run = await has_ended(lab, client, "failing")
        other = await has_ended(lab, client, "failing", key="other")
        for left in client.list("left_behind"):
            client.cancel(left.id)
            await lab.ended(left.id)
        client.forget(EMAIL)
        for going_on in (
            lambda: client.retry(run),
            lambda: client.rewind(run, 1),
            lambda: client.fork(run, 1),
            lambda: client.resolve(run, 2, 1),
        ):
            with pytest.raises(RunConflict, match="was forgotten"):
                going_on()
        assert list(client.change("retry", [run, other])) == [other], "the others of a batch are not held up"
        await lab.ended(other)
    assert client.get(run).status == "failed"
    assert client.get(run).error == {"type": "ValueError", "message": "forgotten"}
    assert not client.signal(run, "go", SECRET)
    assert not client.cancel(run)


# -- on the command line -----------------------------------------------------------------------------------


async def test_the_command_asks_and_says_how_many(
    lab: Lab, client: Client, db: Db, stepwell: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lab.engine(carrying()):
        run = await has_ended(lab, client, "child")
    dry = stepwell("forget", "--key", EMAIL, "--dry-run", "--json")
    assert json.loads(dry.stdout) == {"matching": 1, "forgotten": [], "dry_run": True}
    refused = stepwell("forget", "--key", EMAIL)
    assert refused.exit_code == 2
    assert "1 run to forget" in refused.stderr
    assert "pass --yes" in refused.stderr
    assert client.result(run) == f"noted {SECRET}"
    done = stepwell("forget", "--key", "-", "--workflow", "child", "--yes", "--json", input=f"{EMAIL}\n")
    assert json.loads(done.stdout) == {"matching": 1, "forgotten": [str(run)], "dry_run": False}
    assert places_of(db, SECRET) == {}
    shown = stepwell("runs", "show", str(run))
    assert shown.exit_code == 0
    assert "forgotten" in shown.stdout
    nothing = stepwell("forget", "--key", EMAIL, "--yes")
    assert (nothing.exit_code, nothing.stderr) == (0, "0 runs to forget\n")
    assert stepwell("runs", "retry", str(run)).exit_code == 1


async def test_the_command_cancels_what_is_open_if_it_is_told_to(
    lab: Lab, client: Client, db: Db, stepwell: Command
) -> None:
    run = client.enqueue("left_behind", word=SECRET, key=EMAIL)
    refused = stepwell("forget", "--key", EMAIL, "--yes")
    assert refused.exit_code == 1
    assert "--cancel cancels it first" in refused.stderr
    nobody = stepwell("forget", "--key", EMAIL, "--yes", "--cancel", "--wait", "100ms")
    assert nobody.exit_code == 1
    assert "nothing was erased" in nobody.stderr
    assert places_of(db, SECRET) != {}
    async with lab.engine(carrying()):
        await lab.ended(run.id)
    done = stepwell("forget", "--key", EMAIL, "--yes", "--cancel")
    assert (done.exit_code, done.stdout) == (0, "1 run forgotten\n")
    assert places_of(db, SECRET) == {}
