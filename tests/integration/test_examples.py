"""examples/: each file is executed, on a worker in this process, and some by the commands that they say to be run by."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import click
import psycopg
import pytest
from click.testing import CliRunner

import worker
from outbox import Run, RunBlocked, RunCancelled, RunFailed
from tests.pooler import direct
from tests.waiting import wait_until
from worker import patched, sleep, step, workflow
from worker.cli import main
from worker.definitions import Registry, collecting
from worker.testing import StepwellTest

with collecting() as REGISTRY:  # one for all: no two examples have a name in common
    from examples import (
        agent,
        approval,
        cancel,
        children,
        fanout,
        migration,
        payment,
        queues,
        repair,
        report,
        saga,
        sync,
        welcome,
    )

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGE = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
CSV = str(ROOT / "examples" / "customers.csv")

Printed = Callable[[], list[str]]


def commands(text: str) -> list[str]:
    """Return the commands of a docstring, or of a page."""
    return re.findall(r"^(?: {4})?(stepwell .*)$", text, re.MULTILINE)


COMMANDS = {path.stem: commands(path.read_text(encoding="utf-8").split('"""')[1]) for path in EXAMPLES}


@pytest.fixture
def stepwell_registry() -> Registry:
    return REGISTRY


@pytest.fixture
def stepwell_url(database_url: str) -> str:
    """The database is of our own cluster here, instead of the plugin's."""
    return direct(database_url)  # the testing kit's, which refuses a pooler


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    """Return what was printed since the last call: what the examples do to the world."""
    return lambda: capsys.readouterr().out.splitlines()  # noqa: PLW0108 - each call reads anew


def names(stepwell: StepwellTest, run: Run[Any], outcome: str = "completed") -> list[str]:
    """Return the calls of a run that ended so, in the order in which they did."""
    history = stepwell.client.history(run.id)
    return [each.name for each in history if each.path and each.n == 0 and each.outcome == outcome]


# -- welcome


@pytest.mark.parametrize("moment", ["before", "after", "recording"])
def test_welcome_saves_once_whatever_dies(stepwell: StepwellTest, printed: Printed, moment: Any) -> None:
    stepwell.enqueue(welcome.create_crm)
    stepwell.run_until_idle()
    ada = welcome.Lead(1, "Ada", "ada@example.com")
    run, again = (stepwell.enqueue(welcome.welcome_lead, ada, key=ada.id) for _ in range(2))
    assert (again.id, again.created) == (run.id, False)
    with stepwell.crash_at(welcome.save_to_crm, moment):
        stepwell.run_until_idle()
    assert run.result() == 1
    assert printed() == ["mail to ada@example.com: Welcome, Ada!"]
    rows = stepwell.connection.execute("select name, email from crm_leads").fetchall()
    assert rows == [("Ada", "ada@example.com")]


def test_welcome_tries_again_when_the_provider_is_down(
    stepwell: StepwellTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_to: str, _text: str) -> None:
        raise ConnectionError("down")

    monkeypatch.setattr(welcome, "deliver", refused)
    run = stepwell.enqueue(welcome.welcome_lead, welcome.Lead(1, "Ada", "ada@example.com"))
    stepwell.run_until_idle(advancing=True)
    with pytest.raises(RunFailed, match="down"):
        run.result()
    assert (
        len(stepwell.client.history(run.id)) == 5 + 1
    )  # the last failure is the outcome; then the end of the run


# -- approval

TRAIN = approval.Expense("Ada", Decimal("99.90"), "train")


def test_approval_reminds_and_goes_on_when_somebody_decides(stepwell: StepwellTest, printed: Printed) -> None:
    run = stepwell.enqueue(approval.approve_expense, TRAIN)
    stepwell.run_until_idle()
    [asked] = printed()
    assert asked.startswith("message to the approvers: Ada asks for 99.90 (train)")
    assert str(run.id) in asked
    assert run.state() == {"waits": "for a decision, day 1 of 3"}

    stepwell.advance(days=1)
    stepwell.run_until_idle()
    assert printed()[0].startswith("message to the approvers: Reminder 1: Ada asks")
    assert run.state() == {"waits": "for a decision, day 2 of 3"}

    run.signal("decision", approval.Decision(approved=False, by="Grace"))
    stepwell.run_until_idle()
    assert run.result() == "rejected by Grace"
    assert printed() == ["message to Ada: Your expense was rejected by Grace"]
    assert run.state() == {"waits": "for nothing"}


def test_approval_ends_when_nobody_decides(stepwell: StepwellTest, printed: Printed) -> None:
    run = stepwell.enqueue(approval.approve_expense, TRAIN)
    stepwell.run_until_idle(advancing=True)
    assert run.result() == "not decided in 3 days"
    assert [line.split()[2] for line in printed()] == ["the", "the", "the", "Ada:"]


def test_approval_takes_no_nonsense_and_can_be_withdrawn(stepwell: StepwellTest) -> None:
    run = stepwell.enqueue(approval.approve_expense, TRAIN)
    run.signal("decision", {"approved": "perhaps"})
    stepwell.run_until_idle()
    assert "approved" in run.state()["problem"]
    run.signal("withdraw")
    stepwell.run_until_idle()
    assert run.result() == "withdrawn"


# -- saga


def book(stepwell: StepwellTest, city: str) -> Run[list[str]]:
    stepwell.enqueue(saga.create_hotel)
    stepwell.run_until_idle()
    return stepwell.enqueue(saga.book_trip, saga.Trip(1, "Ada", city))


def rooms(stepwell: StepwellTest) -> list[Any]:
    return stepwell.connection.execute("select city from hotel_rooms").fetchall()


def test_saga_books_everything(stepwell: StepwellTest) -> None:
    run = book(stepwell, "Oslo")
    stepwell.run_until_idle()
    assert run.result() == [f"airline-{run.id}:1", f"cars-{run.id}:3"]
    assert rooms(stepwell) == [("Oslo",)]


@pytest.mark.parametrize("moment", ["before", "after", "recording"])
def test_saga_undoes_everything_when_there_is_no_car(
    stepwell: StepwellTest, printed: Printed, moment: Any
) -> None:
    run = book(stepwell, "Venice")
    with stepwell.crash_at(saga.release_room, moment):
        stepwell.run_until_idle()
    with pytest.raises(RunFailed, match="there are no cars in Venice"):
        run.result()
    assert names(stepwell, run) == ["book_flight", "reserve_room", "release_room", "refund_flight"]
    assert printed() == ["airline: book a flight to Venice", "airline: refund 120 to Ada for trip 1"]
    assert rooms(stepwell) == []


# -- fanout


def test_fanout_sends_to_the_good_rows_and_tells_of_the_bad_ones(
    stepwell: StepwellTest, printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fanout, "PORTION", 2)
    run = stepwell.enqueue(fanout.send_statements, CSV)
    stepwell.run_until_idle()
    problems = ["line 4: 'not an address' is no address", "line 5: 'none' is no amount"]
    assert run.result() == fanout.Summary(3, Decimal("264.50"), problems)
    assert sorted(line.split()[2] for line in printed()) == [
        "ada@example.com:",
        "donald@example.com:",
        "grace@example.com:",
    ]
    shown = run.progress()
    assert shown is not None
    assert (shown.done, shown.total) == (5, 5)


# -- report


def test_report_is_written_every_night_by_one_run(stepwell: StepwellTest, tmp_path: Path) -> None:
    run = stepwell.enqueue(report.nightly_report, str(tmp_path), key="nightly")
    stepwell.run_until_idle()
    assert list(tmp_path.iterdir()) == []

    stepwell.advance(hours=25)
    stepwell.run_until_idle()
    [path] = tmp_path.iterdir()
    first, *_, last = path.read_text().splitlines()
    assert re.fullmatch(r"until .*: 75 orders, 6250 visits", first)
    assert (run.info().status, run.info().epoch) == ("waiting", 1)

    stepwell.advance(hours=25)
    stepwell.run_until_idle()
    assert run.info().epoch == 2
    [path] = tmp_path.iterdir()  # time that was advanced has passed for the runs, not for the clock
    assert path.read_text().splitlines()[-1] != last


def test_report_begins_at_two() -> None:
    assert report.next_night(datetime(2026, 1, 31, 1, 59, tzinfo=UTC)) == datetime(2026, 1, 31, 2, tzinfo=UTC)
    assert report.next_night(datetime(2026, 1, 31, 2, 0, tzinfo=UTC)) == datetime(2026, 2, 1, 2, tzinfo=UTC)


# -- agent


def said(run: Run[Any], name: str) -> list[Any]:
    return [item.value for item in run.stream(name, follow=False)]


def test_agent_uses_its_tools_and_answers(stepwell: StepwellTest) -> None:
    run = stepwell.enqueue(agent.chat)
    run.signal("message", "Is it warmer in Oslo or in Rome?")
    with stepwell.crash_at(agent.use_tool, "after"):
        stepwell.run_until_idle()
    assert said(run, "tools") == ["Oslo 12°", "Rome 24°"]
    assert said(run, "answers") == ["I have found: Oslo 12°, Rome 24°."]
    assert run.state() == {"messages": 5}
    run.signal("message", "stop")
    stepwell.run_until_idle()
    assert run.result() == 5


def test_agent_goes_on_with_an_empty_history_and_the_whole_conversation(
    stepwell: StepwellTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "TURNS", 2)
    run = stepwell.enqueue(agent.chat)
    for number in range(5):  # they are kept until they are taken
        run.signal("message", f"number {number}")
    stepwell.run_until_idle()
    assert said(run, "answers") == [f"You say: number {number}" for number in range(5)]
    assert run.info().epoch == 2
    stepwell.run_until_idle(advancing=True)  # nobody says anything for an hour
    assert run.result() == 10


# -- children


def test_children_ship_what_can_be_shipped(stepwell: StepwellTest, printed: Printed) -> None:
    order = children.Order(1, "ada@example.com", ["tea", "piano", "book"])
    run = stepwell.enqueue(children.fulfil_order, order)
    stepwell.run_until_idle()
    done = run.result()
    assert done.refunded == ["piano"]
    parcels = stepwell.assert_enqueued(children.ship_parcel, count=3)
    shipped = {f"TRACK-{each.id}" for each in parcels if each.info().status == "succeeded"}
    assert done.tracking.keys() == {"tea", "book"}
    assert set(done.tracking.values()) == shipped
    assert all(each.info().parent == run.id for each in parcels)
    assert sorted(printed()) == [
        "carrier: book, 1.5 kg", "carrier: tea, 1.5 kg", "refund to ada@example.com: piano",
    ]  # fmt: skip

    stepwell.advance(days=7)
    stepwell.run_until_idle()
    assert printed() == ["mail to ada@example.com: how was it?"]


# -- queues


def test_queues_encode_where_the_gpu_is(stepwell: StepwellTest) -> None:
    run = stepwell.enqueue(queues.publish_video, "Oslo")
    stepwell.run_until_idle()
    assert run.result() == "published store/Oslo-480p.mp4, store/Oslo-1080p.mp4"


# -- payment


@pytest.fixture
def charges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Return what the card provider has charged."""
    monkeypatch.setattr(payment, "PROVIDER", tmp_path / "provider")
    return lambda: [path.read_text() for path in (tmp_path / "provider").glob("*")]


def settle(stepwell: StepwellTest, card: str = "4242", supplier: str = "ACME") -> Run[str]:
    return stepwell.enqueue(payment.settle_invoice, payment.Invoice(1, card, 900, supplier))


def test_payment_that_has_arrived_is_not_made_again(
    stepwell: StepwellTest, charges: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    receipt_of_this_step = payment.receipt_of_this_step

    def watched() -> Path:
        asked.append(None)
        return receipt_of_this_step()

    monkeypatch.setattr(payment, "receipt_of_this_step", watched)
    run = settle(stepwell)
    with stepwell.crash_at(payment.charge_card, "after"):
        stepwell.run_until_idle()
    assert run.result() == "sent"
    assert charges() == ["900 by card 4242"]
    assert len(asked) == 2  # the charge and the question, no second charge


@pytest.mark.parametrize("how", ["resolve", "retry"])
def test_payment_that_nobody_can_ask_for_waits_for_a_person(
    stepwell: StepwellTest, charges: Printed, printed: Printed, how: str
) -> None:
    run = settle(stepwell)
    with stepwell.crash_at(payment.transfer, "after"):
        stepwell.run_until_idle()
    with pytest.raises(RunBlocked):
        run.result()
    assert printed() == [
        "bank: 900 to ACME",
        f"pager: settle_invoice {run.id} needs a person: held after an interruption",
    ]
    if how == "resolve":
        stepwell.client.resolve(run.id, "2", "seen on the account")
    else:
        stepwell.client.retry(run.id)
    stepwell.run_until_idle()
    assert run.result() == ("seen on the account" if how == "resolve" else "sent")
    assert printed() == ([] if how == "resolve" else ["bank: 900 to ACME"])
    assert charges() == ["900 by card 4242"]


def test_payment_is_tried_again_when_the_provider_says_so(stepwell: StepwellTest, charges: Printed) -> None:
    run = settle(stepwell, card="busy")
    stepwell.run_until_idle()
    assert charges() == []
    stepwell.advance(seconds=60)
    stepwell.run_until_idle()
    assert run.result() == "sent"
    assert charges() == ["900 by card busy"]


def test_payment_ends_with_a_word_when_it_cannot_be_made(stepwell: StepwellTest, charges: Printed) -> None:
    declined, strange = settle(stepwell, card="empty"), settle(stepwell, supplier="nobody")
    stepwell.run_until_idle()
    assert declined.result() == "declined: no money left"
    assert strange.result() == "not transferred: there is no such account"
    assert charges() == ["900 by card 4242"]


# -- migration

with collecting() as REGISTRY_OF_LAST_MONTH:

    @step
    async def create_account(user: str) -> None: ...

    @step
    async def send_mail(user: str, text: str) -> None: ...

    @workflow(name="onboard")
    async def onboard_of_last_month(user: str) -> None:
        assert patched("account-first")
        await create_account(user)
        await send_mail(user, "welcome")
        await sleep(30 * 86400)
        await send_mail(user, "how is it going?")
        await sleep(30 * 86400)
        await send_mail(user, "would you recommend us?")


def test_migration_lets_old_runs_go_the_way_that_they_have_begun(
    stepwell: StepwellTest, printed: Printed
) -> None:
    with StepwellTest(stepwell.url, registry=REGISTRY_OF_LAST_MONTH) as last_month:
        asked = last_month.enqueue("onboard", {"user": "asked already"})
        last_month.run_until_idle()
        last_month.advance(days=30)
        fresh = last_month.enqueue("onboard", {"user": "not asked yet"})
        last_month.run_until_idle()
    new = stepwell.enqueue(migration.onboard, "new")
    stepwell.run_until_idle(advancing=True)
    assert {stepwell.client.get(run.id).status for run in (asked, fresh, new)} == {"succeeded"}
    assert sorted(printed()) == [
        "account for new",
        "call with new",
        "call with not asked yet",
        "mail to asked already: would you recommend us?",
        "mail to new: welcome",
        "mail to new: would you recommend us?",
        "mail to not asked yet: would you recommend us?",
    ]


def test_migration_runs_both_versions_side_by_side(stepwell: StepwellTest, printed: Printed) -> None:
    old = stepwell.enqueue(migration.close_at_once, "Ada")
    new = stepwell.enqueue(migration.close_in_a_month, "Grace")
    assert (old.info().version, new.info().version) == ("1", "2")
    stepwell.run_until_idle(advancing=True)
    assert (old.result(), new.result()) == ("closed", "closed after a month")
    assert printed()[-1] == "mail to Grace: goodbye"


# -- cancel


@pytest.fixture
def rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(repair, "RATES", tmp_path / "rates.json")
    return repair.RATES


def test_repair_mends_what_has_failed_and_what_was_wrong(
    stepwell: StepwellTest, printed: Printed, rates: Path
) -> None:
    failed = stepwell.enqueue(repair.bill_customer, repair.Customer(1, "NO", 100))
    stepwell.run_until_idle()
    with pytest.raises(RunFailed, match="no rate for NO"):
        failed.result()
    rates.write_text('{"NO": 2}')
    wrong = stepwell.enqueue(repair.bill_customer, repair.Customer(2, "NO", 100))
    stepwell.run_until_idle(advancing=True)
    assert printed() == ["sent: invoice 2: 200.00 EUR"]
    rates.write_text('{"NO": 0.085}')
    trial = repair.repair_month([failed], wrong)
    stepwell.run_until_idle(advancing=True)
    assert [failed.result(), wrong.result(), trial.result()] == [
        "invoice 1: 8.50 EUR",
        "invoice 2: 8.50 EUR",
        "invoice 0: 2.00 EUR",
    ]
    assert sorted(printed()) == [f"sent: {run.result()}" for run in (trial, failed, wrong)]


def test_repair_bills_a_month_and_tells_what_was_not_sent(stepwell: StepwellTest, rates: Path) -> None:
    rates.write_text('{"NO": 0.5}')
    customers = [repair.Customer(1, "NO", 10), repair.Customer(2, "XX", 10)]
    run = stepwell.enqueue(repair.bill_month, customers)
    stepwell.run_until_idle(advancing=True)
    assert run.result()[0] == "invoice 1: 5.00 EUR"
    assert "no rate for XX" in run.result()[1]


def test_cancel_gives_back_what_was_rented(stepwell: StepwellTest, printed: Printed) -> None:
    run = stepwell.enqueue(cancel.simulate, 5)
    stepwell.run_until_idle()
    assert run.cancel()
    stepwell.run_until_idle()
    with pytest.raises(RunCancelled):
        run.result()
    server = f"simulation-{run.id}"
    assert printed() == [f"rented {server}", f"round 1 on 10.0.0.1/{server}", f"gave back 10.0.0.1/{server}"]
    assert run.state() == {"progress": {"done": 1, "total": 5}, "cleaning up": True}


def test_cancel_by_a_deadline_gives_back_too(stepwell: StepwellTest, printed: Printed) -> None:
    run = stepwell.enqueue(cancel.simulate, 5, deadline=900)
    stepwell.run_until_idle(advancing=True)
    with pytest.raises(RunFailed, match="DeadlineExceeded"):
        run.result()
    assert [line.split()[0] for line in printed()] == ["rented", "round", "round", "gave"]


def test_cancel_gives_back_at_the_end(stepwell: StepwellTest, printed: Printed) -> None:
    run = stepwell.enqueue(cancel.simulate, 2)
    stepwell.run_until_idle(advancing=True)
    assert run.result() == 1.5
    assert [line.split()[0] for line in printed()] == ["rented", "round", "round", "gave"]


# -- sync


def test_sync_orders_from_the_cheapest(stepwell: StepwellTest, printed: Printed) -> None:
    run = stepwell.enqueue(sync.quote, "wheel", 4)
    stepwell.run_until_idle()
    assert printed() == ["mail to sales: east offers wheel for 56"]
    run.signal("accepted", "Ada")
    stepwell.run_until_idle(advancing=True)
    assert run.result() == ["east", "store", "store"]
    lines = printed()
    assert lines[0] == "mail to Ada: thank you"
    assert sorted(lines[1:3]) == ["mail to east: we order wheel", "mail to store: wheel comes"]
    assert lines[3:] == ["mail to store: has wheel come?"]


def test_sync_ends_when_nobody_accepts(stepwell: StepwellTest) -> None:
    run = stepwell.enqueue(sync.quote, "wheel", 4)
    stepwell.run_until_idle(advancing=True)
    assert run.result() == []


# -- all of them


def test_every_example_has_a_test_and_a_row_in_the_table() -> None:
    tests = [
        name for name, value in globals().items() if name.startswith("test_") and inspect.isfunction(value)
    ]
    for path in EXAMPLES:
        assert any(name.startswith(f"test_{path.stem}_") for name in tests), path
        assert f"| [{path.name}]({path.name}) |" in PAGE
        assert any(command.startswith("stepwell enqueue") for command in COMMANDS[path.stem]), path
        assert f"stepwell worker examples/{path.name}" in COMMANDS[path.stem]


def test_every_public_name_occurs_in_an_example() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in EXAMPLES)
    for name in worker.__all__:
        value = getattr(worker, name)
        if inspect.isclass(value) and not issubclass(value, BaseException):
            continue  # what others are made of, for annotations
        assert len(re.findall(rf"\b{name}\b", text)) > 1, name


def test_every_option_of_a_definition_occurs_in_an_example() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in EXAMPLES)
    for option in ("retry", "timeout", "on_crash", "verify", "raises", "queue", "undo"):
        assert re.search(rf"^(@step\(|@transaction\(|    )(.*, )?{option}=", text, re.MULTILINE), option


def test_check_finds_nothing_in_the_examples() -> None:
    done = CliRunner().invoke(main, ["check", *map(str, EXAMPLES)])
    assert (done.exit_code, done.stdout) == (0, "")


@pytest.mark.parametrize(
    "command", [each for listed in [*COMMANDS.values(), commands(PAGE)] for each in listed]
)
def test_the_commands_of_the_examples_can_be_given(command: str) -> None:
    _, *words = shlex.split(command)
    found: click.Command | None = main
    while isinstance(found, click.Group):
        name, *words = words
        found = found.get_command(click.Context(found), name)
    assert found is not None, command
    given = found.make_context(found.name, words).params
    if text := given.get("input_text"):
        known = [each for each in REGISTRY.workflows.values() if each.name == given["workflow"]]
        for each in known:
            each.signature.check_input(json.loads(text), where=command)
        assert known, command
    if app := given.get("app"):
        assert (ROOT / app).exists()


def test_the_links_of_the_page_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "examples" / target).exists(), target


class Terminal:
    """Where the commands of an example are typed; `RUN` is the run that was enqueued last."""

    def __init__(self, url: str, home: Path) -> None:
        self.output = home / "workers.log"
        self._log = self.output.open("wb")
        self._db = psycopg.connect(direct(url), autocommit=True)
        self._workers: list[subprocess.Popen[bytes]] = []
        self._run = "RUN"
        self._environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "STEPWELL_DATABASE_URL": url,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._workers:
            each.send_signal(signal.SIGTERM)
        for each in self._workers:
            each.wait(30)
        self._log.close()
        self._db.close()

    def type(self, command: str) -> None:
        words = [self._run if word == "RUN" else word for word in shlex.split(command)]
        if words[1] == "worker":
            self._start(words)
            return
        done = subprocess.run(
            words, cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert "Traceback" not in done.stderr
        assert done.returncode == 0 or "--wait" in words, done.stderr  # which says how the run has ended
        if words[1] == "enqueue" and "--wait" not in words:
            self._run = str(UUID(done.stdout.strip()))

    def outcomes(self) -> list[tuple[Any, ...]]:
        """Return the workflows and results of all runs, when they have ended."""
        ended = "select bool_and(finished_at is not null) from stepwell.runs"
        wait_until(lambda: self._db.execute(ended).fetchone() == (True,), 60, what="the runs to end")
        told = "select workflow, status from stepwell.run_status order by id"
        return self._db.execute(told).fetchall()

    def _start(self, words: list[str]) -> None:
        self._workers.append(
            subprocess.Popen(words, cwd=ROOT, env=self._environment, stdout=self._log, stderr=self._log)
        )
        count = "select count(*) from stepwell.workers"
        wait_until(
            lambda: self._db.execute(count).fetchone() == (len(self._workers),),
            30,
            what="the worker to register",
        )


DONE = "succeeded"


@pytest.mark.parametrize(
    ("example", "outcomes", "effects"),
    [
        ("welcome", [("create_crm", DONE), ("welcome_lead", DONE)], ["mail to ada@example.com: Welcome, Ada!"]),
        ("approval", [("approve_expense", DONE)], ["message to Ada: Your expense was approved by Grace"]),
        (
            "saga",
            [("create_hotel", DONE), ("book_trip", DONE), ("book_trip", "failed")],
            ["cars: rent a car in Oslo", "airline: refund 120 to Ada for trip 2"],
        ),
        ("fanout", [("send_statements", DONE)], ["mail to donald@example.com: Dear Donald, your balance is 64"]),
        ("queues", [("publish_video", DONE)], []),
    ],
)  # fmt: skip
def test_the_commands_of_an_example_do_what_it_says(
    database_url: str, tmp_path: Path, example: str, outcomes: list[Any], effects: list[str]
) -> None:
    with Terminal(database_url, tmp_path) as terminal:
        for command in COMMANDS[example]:
            terminal.type(command)
        assert terminal.outcomes() == outcomes
    lines = terminal.output.read_text().splitlines()
    assert [line for line in effects if line not in lines] == []
