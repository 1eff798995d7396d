"""Sealed payloads: nothing of a run is readable in the database, and everything goes on as without keys."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
import pytest
import pytest_asyncio
from psycopg.rows import TupleRow
from tenacity import stop_after_attempt, wait_fixed

from outbox import AsyncClient, RunFailed, Sealed, Settings
from outbox.errors import PayloadError
from tests.engines import Lab, until
from tests.scanning import everything, places_of
from worker import (
    call,
    continue_as,
    current_step,
    emit,
    gather,
    map,
    progress,
    retrying,
    set_state,
    start,
    step,
    transaction,
    wait_signal,
    workflow,
)
from worker.definitions import collecting
from worker.engine.recorded import from_database
from worker.engine.sealed import rehearsed
from worker.replay.guards import UNGUARDED

Db = psycopg.Connection[TupleRow]

SECRET = "xylophone"
"""Part of everything that is carried in these tests, and of nothing else."""


def key(name: str, byte: int) -> str:
    return f"{name}:{base64.b64encode(bytes([byte]) * 32).decode()}"


OLD, NEW, OTHER = key("old", 1), key("new", 2), key("other", 3)


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


@asynccontextmanager
async def client_with(lab: Lab, keys: str | None) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(settings=Settings(database_url=lab.url, encryption_keys=keys)) as client:
        yield client


@pytest_asyncio.fixture
async def client(lab: Lab) -> AsyncIterator[AsyncClient]:
    async with client_with(lab, OLD) as opened:
        yield opened


def assert_unreadable(db: Db, keys: str = OLD) -> None:
    assert places_of(db, SECRET) == {}
    for entry in keys.split(","):
        assert places_of(db, entry.partition(":")[2][:12]) == {}, "a key is in the database"


@dataclass
class Person:
    name: str
    vip: bool


@dataclass
class CardDeclined(Exception):
    card: str


class Flows(NamedTuple):
    registry: Any
    everything: Any
    seen: list[Any]


@pytest.fixture
def flows(db: Db) -> Flows:  # noqa: C901 - definitions, and not decisions
    """A workflow that carries the secret in every way in which something is recorded."""
    seen: list[Any] = []
    db.execute("create table sold (item text)")
    with collecting() as registry:

        @step
        async def greet(person: Person) -> str:
            return f"hello {person.name}"

        @transaction
        def sell(connection: psycopg.Connection[Any], item: str) -> dict[str, str]:
            connection.execute("insert into sold values ('something')")
            return {"sold": item}

        @step
        def shout(word: str) -> str:
            return word.upper()

        @step(
            raises=(CardDeclined,),
            retry=retrying(stop=stop_after_attempt(2), wait=wait_fixed(0), on=CardDeclined),
        )
        async def charge(card: str) -> None:
            raise CardDeclined(card)

        @step
        async def book(what: str) -> str:
            return f"{what} is booked"

        @step
        def unbook(what: str, booked: str) -> None:
            seen.append(("unbook", what, booked))

        booking = step(undo=unbook, name="booking")(book.function)

        @workflow
        async def child(person: Person) -> Person:
            await greet(person)
            return Person(person.name.upper(), person.vip)

        @workflow
        async def failing_child(word: str) -> None:
            await booking(word)
            raise ValueError(f"no {word}")

        @workflow
        async def everything(person: Person, turn: int = 1) -> dict[str, Any]:
            set_state("for whom", person.name)
            progress(1, 2)
            emit("log", {"for": person.name})
            said = await greet(person)
            sold = sell(person.name)
            words = await map(shout, [person.name] * 3, limit=2)
            both = await gather(call(shout, person.name), greet(person))
            made = await child(person)
            begun = start(child, person)
            try:
                await charge(person.name)
            except CardDeclined as declined:
                card = declined.card
            try:
                await failing_child(person.name)
            except RunFailed as failed:
                seen.append(str(failed))
            approval = await wait_signal("approved", type=Person)
            late = await begun
            if turn == 1:
                continue_as(person, 2)
            return {
                "said": said, "sold": sold, "words": words, "both": both, "made": made.name, "late": late.name,
                "card": card, "approved by": approval.name,
            }  # fmt: skip

    return Flows(registry, everything, seen)


async def test_nothing_that_a_run_carries_is_readable_in_the_database(
    lab: Lab, client: AsyncClient, flows: Flows, db: Db
) -> None:
    run = await client.enqueue(flows.everything, Person(SECRET, True))
    async with lab.engine(flows.registry, encryption_keys=OLD):
        for turn in (1, 2):

            async def asked(turn: int = turn) -> bool:
                rows = await lab.execute(
                    "select t.awaits from stepwell.tasks t join stepwell.runs r on r.id = t.run_id"
                    " where t.run_id = %s and t.kind = 'run' and t.state = 'waiting' and r.epoch = %s",
                    [run.id, turn - 1],
                )
                return bool(rows) and rows[0][0] is not None and "approved" in rows[0][0]

            await until(asked, what=f"turn {turn} to ask for approval")
            assert_unreadable(db)
            assert (await run.state())["for whom"] == SECRET
            assert (await run.progress()) is not None
            await client.signal(run.id, "approved", Person(SECRET, False))
            assert_unreadable(db)
        result = await run.result(timeout=20)
    capital = SECRET.upper()
    assert result == {
        "said": f"hello {SECRET}", "sold": {"sold": SECRET}, "words": [capital] * 3,
        "both": [capital, f"hello {SECRET}"], "made": capital, "late": capital, "card": SECRET, "approved by": SECRET,
    }  # fmt: skip
    assert_unreadable(db)
    assert [item.value async for item in run.stream(follow=False)] == [{"for": SECRET}] * 2
    assert flows.seen.count(("unbook", SECRET, f"{SECRET} is booked")) == 2
    assert any(isinstance(each, str) and f"no {SECRET}" in each for each in flows.seen)
    history = await client.history(run.id)
    assert all(
        SECRET in json.dumps(each.value).lower()
        for each in history
        if each.kind in ("step", "child") and each.value
    )
    assert {each.error["data"]["card"] for each in history if each.name == "charge" and each.error} == {
        SECRET
    }
    assert not any(isinstance(each.value, Sealed) for each in history)


async def test_who_has_no_key_sees_that_a_value_is_sealed_and_with_which_key(
    lab: Lab, client: AsyncClient, db: Db
) -> None:
    with collecting() as registry:

        @step
        async def fail(word: str) -> str:
            raise ValueError(word)

        @workflow
        async def failing(word: str) -> None:
            emit("log", word)
            set_state("word", word)
            await fail(word)

        @workflow
        async def succeeding(word: str) -> str:
            return word

    failed, succeeded = await client.enqueue(failing, SECRET), await client.enqueue(succeeding, SECRET)
    async with lab.engine(registry, encryption_keys=OLD):
        assert await succeeded.result(timeout=20) == SECRET
        with pytest.raises(RunFailed, match=SECRET):
            await failed.result(timeout=20)
    for keys in (None, NEW, key("old", 9)):  # none, another one, another one of the same id
        async with client_with(lab, keys) as blind:
            info = await blind.get(failed.id)
            assert isinstance(info.input, Sealed)
            assert str(info.input) == "sealed with key old"
            assert info.error == {"type": "ValueError", "message": "sealed with key old"}
            assert {str(item.value) async for item in blind.stream(failed.id)} == {"sealed with key old"}
            assert str((await blind.state(failed.id))["word"]) == "sealed with key old"
            with pytest.raises(PayloadError, match=r"with key 'old'"):
                await blind.result(succeeded.id)
            with pytest.raises(RunFailed, match="sealed with key old"):
                await blind.result(failed.id)
            shown = json.dumps([each.to_json() for each in await blind.history(failed.id)])
            assert SECRET not in shown


async def test_a_run_goes_on_after_the_keys_were_rotated_while_it_was_parked(
    lab: Lab, client: AsyncClient, db: Db
) -> None:
    calls: list[str] = []
    with collecting() as registry:

        @step
        async def note(word: str) -> str:
            calls.append(word)
            return f"{word} noted"

        @workflow(strict=True)
        async def flow(word: str) -> list[Any]:
            first = await note(word)
            both = await gather(note(first), note(word))
            answer = await wait_signal("go", type=str)
            return [first, *both, answer, await note(answer)]

    run = await client.enqueue(flow, SECRET)
    async with lab.engine(registry, encryption_keys=OLD):
        await lab.waits(run.id)
        await until(lambda: waiting_for(lab, run.id, "go"), what="the run to wait for its signal")
    assert keys_in(db) == {"old"}
    async with (
        lab.engine(registry, encryption_keys=f"{NEW},{OLD}"),
        client_with(lab, f"{NEW},{OLD}") as later,
    ):
        await later.signal(run.id, "go", SECRET)
        result = await later.result(run.id, timeout=20)
    assert result == [
        f"{SECRET} noted",
        f"{SECRET} noted noted",
        f"{SECRET} noted",
        SECRET,
        f"{SECRET} noted",
    ]
    assert len(calls) == 4, "what was recorded is not executed again"
    assert keys_in(db) == {"old", "new"}
    assert_unreadable(db, f"{OLD},{NEW}")


async def test_a_worker_without_the_key_blocks_a_run_and_names_the_key_and_a_retry_goes_on(
    lab: Lab, client: AsyncClient
) -> None:
    calls: list[str] = []
    with collecting() as registry:

        @step
        async def note(word: Any) -> Any:
            calls.append(word)
            return word

        @workflow
        async def flow(word: Any) -> Any:
            await note(word)
            await wait_signal("go")
            return await note(word)

    for keys in (None, NEW):
        run = await client.enqueue(flow, SECRET)
        async with lab.engine(registry, encryption_keys=keys):
            row = await lab.ended(run.id)
        assert row.state == "blocked"
        assert "sealed with key 'old'" in row.error["reason"]
        why = await client.why(run.id)
        assert why is not None
        assert "sealed with key 'old'" in why
        assert calls == []
        assert await client.retry(run.id) == 1
        async with lab.engine(registry, encryption_keys=OLD):
            await until(lambda run=run: waiting_for(lab, run.id, "go"), what="the signal to be waited for")
            await client.signal(run.id, "go")
            assert await client.result(run.id, timeout=20) == SECRET
        assert calls == [SECRET, SECRET]
        calls.clear()


async def test_a_history_that_is_sealed_is_never_taken_for_values(lab: Lab) -> None:
    """The input is plain, as SQL writes it; what a worker with a key has recorded, one without must not hand out."""
    calls: list[Any] = []
    with collecting() as registry:

        @step
        async def note(word: Any) -> Any:
            calls.append(word)
            return {"noted": word}

        @workflow
        async def flow(word: Any) -> Any:
            noted = await note(word)
            await wait_signal("go")
            return await note(noted)

    run = await lab.enqueue(flow, {"word": 1})
    async with lab.engine(registry, encryption_keys=OLD):
        await until(lambda: waiting_for(lab, run, "go"), what="the signal to be waited for")
    await lab.execute("select stepwell.signal(%s, 'go', '{\"plain\": 1}')", [run])
    async with lab.engine(registry):
        assert (await lab.ended(run)).state == "blocked"
    assert calls == [1]
    await lab.retry(run)
    async with lab.engine(registry, encryption_keys=OLD):
        row = await lab.ended(run)
    assert row.state == "succeeded"
    assert calls == [1, {"noted": 1}]


async def test_a_step_on_its_own_without_its_key_blocks_the_run(lab: Lab, client: AsyncClient) -> None:
    calls: list[str] = []
    with collecting() as registry:

        @step(queue="far")
        async def note(word: str) -> str:
            calls.append(word)
            return word

        @workflow
        async def flow(word: str) -> str:
            return await note(word)

    run = await client.enqueue(flow, SECRET)
    async with lab.engine(registry, encryption_keys=f"{NEW},{OLD}"):
        await lab.waits(run.id)
        async with lab.engine(registry, queues=["far"], encryption_keys=OLD):
            row = await lab.ended(run.id)
    assert row.state == "blocked"
    assert "sealed with key 'new'" in row.error["reason"]
    assert calls == []
    assert await client.retry(run.id) == 1
    async with lab.engine(registry, queues=["default", "far"], encryption_keys=f"{OLD},{NEW}"):
        assert await run.result(timeout=20) == SECRET
    assert calls == [SECRET]


async def test_a_signal_without_its_key_blocks_the_run_and_is_there_after_a_retry(
    lab: Lab, client: AsyncClient
) -> None:
    with collecting() as registry:

        @workflow
        async def flow(word: str) -> str:
            set_state("seen", await wait_signal("first", type=str))
            return await wait_signal("go", type=str)

    run = await client.enqueue(flow, SECRET)
    await client.signal(run.id, "first", "one")
    async with client_with(lab, NEW) as other:
        await other.signal(run.id, "go", SECRET)
    async with lab.engine(registry, encryption_keys=OLD):
        row = await lab.ended(run.id)
    assert row.state == "blocked"
    assert "signal 'go' is sealed with key 'new'" in row.error["reason"]
    assert await client.retry(run.id) == 1
    async with lab.engine(registry, encryption_keys=f"{OLD},{NEW}"):
        assert await run.result(timeout=20) == SECRET
    assert await run.state() == {"seen": "one"}


async def test_an_old_worker_gives_back_what_newer_ones_with_the_key_can_open(lab: Lab) -> None:
    with collecting() as registry:

        @workflow
        async def flow(word: str) -> str:
            return word

    async with lab.engine(registry, encryption_keys=OLD) as old:
        async with lab.engine(registry, encryption_keys=f"{NEW},{OLD}"), client_with(lab, NEW) as client:
            runs = [run async for run in client.enqueue_many(flow, [f"{SECRET} {n}" for n in range(30)])]
            assert [await run.result(timeout=30) for run in runs] == [f"{SECRET} {n}" for n in range(30)]
        assert not old.task.done()


async def test_what_an_old_worker_has_given_back_it_leaves_to_newer_ones_however_seldom_they_look(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the first to know that it has given something back, and would claim it again at once."""
    with collecting() as registry:

        @workflow
        async def flow(word: str) -> str:
            return word

    given_back: Counter[str] = Counter()
    with caplog.at_level(logging.INFO, logger="worker.engine.claimed"):
        async with (
            lab.engine(registry, encryption_keys=OLD, poll_seconds=0.02),
            lab.engine(registry, encryption_keys=f"{NEW},{OLD}", poll_seconds=0.5),
            client_with(lab, NEW) as client,
        ):
            while not given_back:  # each time the other one may have been the first
                runs = [run async for run in client.enqueue_many(flow, [SECRET] * 5)]
                assert [await run.result(timeout=60) for run in runs] == [SECRET] * 5
                given_back.update(
                    vars(each)["run_id"] for each in caplog.records if "given back" in each.message
                )
    assert set(given_back.values()) == {1}


async def test_plain_inputs_and_signals_of_sql_go_in_and_everything_of_them_comes_out_sealed(
    lab: Lab, client: AsyncClient, db: Db
) -> None:
    with collecting() as registry:

        @step
        async def note(word: str, number: int) -> str:
            return f"{word}-{number}"

        @workflow(strict=True)
        async def flow(number: int) -> list[str]:
            word = await wait_signal("word", type=str)
            return [await note(word, number), *await gather(note(word, 1), note(word, 2))]

    run = await lab.enqueue(flow, {"number": 17})
    async with lab.engine(registry, encryption_keys=OLD):
        await lab.waits(run)
        await lab.execute("select stepwell.signal(%s, 'word', %s)", [run, json.dumps(SECRET)])
        assert await client.result(run, timeout=20) == [f"{SECRET}-{n}" for n in (17, 1, 2)]
    assert_unreadable(db)
    assert (await client.get(run)).input == {"number": 17}
    assert {each.fingerprint for each in await client.history(run)} == {None}, (
        "there is no key to veil them by"
    )


async def test_fingerprints_are_veiled_and_still_tell_a_step_that_is_called_with_other_arguments(
    lab: Lab, client: AsyncClient, db: Db
) -> None:
    flag = [True]
    with collecting() as registry:

        @step
        async def vote(yes: bool) -> bool:
            return yes

        @workflow(strict=True)
        async def flow(name: str) -> bool:
            await vote(flag[0])
            await vote(flag[0])
            await wait_signal("go")
            return True

    runs = [await client.enqueue(flow, SECRET) for _ in range(2)]
    async with lab.engine(registry, encryption_keys=OLD):
        for run in runs:
            await until(lambda run=run: waiting_for(lab, run.id, "go"), what="the signal to be waited for")
    marks = [[each.fingerprint for each in await client.history(run.id)] for run in runs]
    assert marks[0][0] == marks[0][1] is not None
    assert marks[0][0] != marks[1][0], "two runs that vote alike do not look alike"
    fork = await client.fork(runs[0].id, 3)
    other = await client.fork(runs[0].id, 3, input={"name": SECRET * 2})
    for recorded in from_database(db):
        assert rehearsed(recorded, flow, Settings(encryption_keys=OLD).keyring(), UNGUARDED) is None
    flag[0] = False
    drifting = {
        recorded.id: rehearsed(recorded, flow, Settings(encryption_keys=f"{NEW},{OLD}").keyring(), UNGUARDED)
        for recorded in from_database(db)
    }
    for run_id in (runs[0].id, runs[1].id, fork, other):
        mismatch = drifting[run_id]
        assert mismatch is not None, run_id
        assert "arguments" in mismatch.message
    async with lab.engine(registry, encryption_keys=OLD):
        await client.signal(runs[0].id, "go")
        assert (await lab.ended(runs[0].id)).state == "blocked"


async def test_a_fork_with_an_input_under_another_key_forgets_fingerprints_that_it_could_not_compare(
    lab: Lab, client: AsyncClient
) -> None:
    with collecting() as registry:

        @step
        async def note(word: str) -> str:
            return word

        @workflow(strict=True)
        async def flow(word: str) -> str:
            first = await note("always this")
            await wait_signal("go")
            return first + await note(word)

    run = await client.enqueue(flow, SECRET)
    keys = f"{NEW},{OLD}"
    async with lab.engine(registry, encryption_keys=keys), client_with(lab, keys) as later:
        await until(lambda: waiting_for(lab, run.id, "go"), what="the signal to be waited for")
        fork = await later.fork(run.id, 2, input={"word": SECRET.upper()})
        await later.signal(fork, "go")
        assert await later.result(fork, timeout=20) == "always this" + SECRET.upper()


async def test_runs_are_retried_rewound_and_resolved_under_keys(
    lab: Lab, client: AsyncClient, db: Db
) -> None:
    broken = [True]
    with collecting() as registry:

        @step
        async def note(word: str) -> str:
            return f"noted {word}"

        @step
        async def send(word: str) -> str:
            if broken[0]:
                raise ConnectionError(word)
            return f"sent {word}"

        @workflow
        async def flow(word: str) -> list[str]:
            noted = await note(word)
            heard = await wait_signal("go", type=str)
            return [noted, heard, await send(noted)]

    run = await client.enqueue(flow, SECRET)
    async with lab.engine(registry, encryption_keys=OLD):
        await client.signal(run.id, "go", f"go {SECRET}")
        with pytest.raises(RunFailed, match=f"noted {SECRET}"):
            await run.result(timeout=20)
        await client.resolve(run.id, 3, f"by hand {SECRET}")
        noted = f"noted {SECRET}"
        assert await run.result(timeout=20) == [noted, f"go {SECRET}", f"by hand {SECRET}"]
        assert_unreadable(db)
        await client.rewind(run.id, 2)
        with pytest.raises(RunFailed):
            await run.result(timeout=20)
        await client.resolve(run.id, 3, error=f"never {SECRET}")
        with pytest.raises(RunFailed, match=f"never {SECRET}"):
            await run.result(timeout=20)
        await client.rewind(run.id, 2)
        broken[0] = False
        assert await run.result(timeout=20) == [noted, f"go {SECRET}", f"sent {noted}"]
    assert_unreadable(db)


async def test_a_step_that_was_interrupted_is_executed_again_with_what_was_sealed_for_it(
    lab: Lab, client: AsyncClient, db: Db
) -> None:
    executions: list[tuple[int, str]] = []
    with collecting() as registry:

        @step
        async def note(word: str) -> str:
            executions.append((current_step().execution, word))
            if len(executions) < 2:
                await never()
            return word

        @workflow
        async def flow(word: str) -> list[str]:
            return await gather(note(word), note(word))

    run = await client.enqueue(flow, SECRET)
    first = lab.start(registry, encryption_keys=OLD, concurrency=2)
    await until(lambda: _told(executions), what="a step to be executed")
    await first.crash()
    async with lab.engine(registry, encryption_keys=f"{NEW},{OLD}"):
        assert await result_of(lab, run.id) == [SECRET, SECRET]
    assert {word for _, word in executions} == {SECRET}
    assert max(number for number, _ in executions) == 2
    assert_unreadable(db, f"{OLD},{NEW}")


async def test_a_value_that_was_moved_or_changed_in_the_database_is_refused(
    lab: Lab, client: AsyncClient
) -> None:
    with collecting() as registry:

        @workflow
        async def flow(word: str) -> Any:
            return await wait_signal("approved", type=str)

    moved, changed = await client.enqueue(flow, "a"), await client.enqueue(flow, "b")
    async with lab.engine(registry, encryption_keys=OLD):
        for run in (moved, changed):
            await lab.waits(run.id)
        await client.signal(moved.id, "denied", SECRET)
        await lab.execute("update stepwell.signals set name = 'approved'")
        await lab.execute("select stepwell.wake(%s, 'signal', '{\"name\": \"approved\"}')", [moved.id])
        row = await lab.ended(moved.id)
        assert row.state == "blocked"
        assert "stands where another value belongs" in row.error["reason"]
    await lab.execute(
        "update stepwell.runs set input = overlay(input::text placing 'AAAA' from 60)::json where id = %s",
        [changed.id],
    )
    async with lab.engine(registry, encryption_keys=OLD):
        await client.signal(changed.id, "approved", "x")
        row = await lab.ended(changed.id)
        assert row.state == "blocked"
        assert "it was changed" in row.error["reason"]


async def test_a_value_of_the_users_that_looks_like_a_sealed_one_is_refused_in_plain_and_carried_when_sealed(
    lab: Lab, client: AsyncClient
) -> None:
    looks = {"stepwell:sealed": {"k": "old", "d": "AAAA"}}
    with collecting() as registry:

        @step
        async def give(what: Any) -> Any:
            return what

        @workflow
        async def flow(what: Any) -> Any:
            return await give({"within": what})

    async with client_with(lab, None) as plain:
        with pytest.raises(PayloadError, match="Stepwell's own"):
            await plain.signal(UUID(int=1), "x", looks)
    forged = await lab.enqueue(flow, looks)
    run = await client.enqueue(flow, looks)
    async with lab.engine(registry, encryption_keys=OLD):
        assert await run.result(timeout=20) == {"within": looks}
        assert (await lab.ended(forged)).state == "blocked"


# -- parts ---------------------------------------------------------------------------------------------


async def never() -> None:
    await asyncio.Event().wait()


async def _told(executions: list[Any]) -> bool:
    return bool(executions)


async def result_of(lab: Lab, run: UUID) -> Any:
    async with client_with(lab, f"{OLD},{NEW}") as client:
        return await client.result(run, timeout=20)


async def waiting_for(lab: Lab, run: UUID, name: str) -> bool:
    rows = await lab.execute(
        "select 1 from stepwell.tasks where run_id = %s and kind = 'run' and state = 'waiting' and %s = any (awaits)",
        [run, name],
    )
    return bool(rows)


def keys_in(db: Db) -> set[str]:
    return {name for row in everything(db).values() for name in re.findall(r'k\\*"+:\\*"+(\w+)', row)}
