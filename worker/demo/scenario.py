"""The demo from end to end: set up, enqueue, kill, wait, judge, take down.

One process runs this, with one connection of its own. Around it: a fresh Postgres (`home`), the mail
provider and ``stepwell worker`` (`processes`), the kills (`kills`). What came of it is judged from what is
in the database and in the Maildir afterwards (`report`), not from what this module believes to have done.

Whatever ends it, an exception or a signal included, everything that was started is taken down in reverse
order and the directory is deleted.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import click
import psycopg
from rich.console import Console

from outbox import Client, Settings
from outbox.database import connect
from outbox.errors import ConfigError
from outbox.schema import migrate
from worker.demo.display import Display
from worker.demo.home import fresh_home, fresh_postgres
from worker.demo.interruption import Interrupted, Interruption
from worker.demo.kills import Kills
from worker.demo.leads import Intake, take_in
from worker.demo.maildir import Maildir
from worker.demo.processes import Provider, Workers, log_end, reserved_port
from worker.demo.queries import load
from worker.demo.report import Facts, Report, Unanswered, report_of, show
from worker.demo.workflows import welcome_lead

__all__ = ["Interrupted", "Options", "run"]

APP = "worker.demo.workflows"
POLL_SECONDS = 0.02
STUCK_AFTER_SECONDS = 45.0
"""Longer than the slowest detector of a dead worker takes, with everything else in the way."""
SIGNALS_SETTLE_SECONDS = 0.5
WAVES = 6
WAVES_TAKE_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What ``stepwell demo`` can be told."""

    leads: int = 1000
    processes: int = 3
    metrics_port: int = 9464
    keep: bool = False
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Everything that is up."""

    url: str
    connection: psycopg.Connection[Any]
    maildir: Maildir
    workers: Workers
    metrics_port: int
    intake: Intake = field(default_factory=Intake)


def run(options: Options, console: Console) -> Report:
    """Run the demo and return its report, which is printed as well: as JSON on stdout, or on `console`.

    With `keep` this returns when a signal comes. Before that a signal raises Interrupted; ConfigError is
    raised for what keeps the demo from starting.
    """
    if importlib.util.find_spec("aiosmtpd") is None:
        raise ConfigError('the demo needs aiosmtpd: pip install "stepwell[demo]"')
    with Interruption() as interruption:
        try:
            with _stage(options, console, interruption) as stage:
                report = _perform(stage, options, console, interruption)
                if options.keep:
                    _print_what_is_up(stage, console)
                    interruption.wait()
                return report
        except Exception:
            # Ctrl-C reaches Postgres's own tools as well, whose failure is not what is to be reported.
            interruption.check()
            raise


# -- setting up --------------------------------------------------------------------------------------


@contextmanager
def _stage(options: Options, console: Console, interruption: Interruption) -> Iterator[Stage]:
    """Bring everything up but the workers; take everything down at the end, the workers first."""
    concurrency, latency_seconds = pace(options.leads, options.processes)
    with ExitStack() as stack:
        home = stack.enter_context(fresh_home())
        console.print(f"Starting a Postgres of its own in {home} …", highlight=False)
        url = stack.enter_context(fresh_postgres(home))
        interruption.check()
        connection = stack.enter_context(connect(url, application_name="stepwell demo"))
        migrate(connection)
        connection.execute((files("worker.demo") / "crm.sql").read_bytes())
        provider = Provider(home / "mail", home, latency_seconds)
        stack.callback(provider.stop)
        smtp_port = provider.start()
        interruption.check()
        metrics_port = stack.enter_context(reserved_port(options.metrics_port))
        if metrics_port != options.metrics_port:
            console.print(
                f"Port {options.metrics_port} is taken: metrics are on {metrics_port}.", highlight=False
            )
        workers = Workers(
            APP,
            {
                "--processes": options.processes,
                "--concurrency": concurrency,
                "--metrics-port": metrics_port,
            },
            {
                "STEPWELL_DATABASE_URL": url,
                "STEPWELL_DEMO_SMTP": f"127.0.0.1:{smtp_port}",
                "STEPWELL_DEMO_MAILDIR": str(home / "mail"),
            },
            home,
        )
        stack.callback(workers.stop)
        yield Stage(
            url=url,
            connection=connection,
            maildir=Maildir(home / "mail"),
            workers=workers,
            metrics_port=metrics_port,
        )


def pace(leads: int, processes: int) -> tuple[int, float]:
    """Return runs in flight per process, and seconds that the provider takes for a message.

    Chosen so that the work comes in several waves that take a few seconds in all: a kill then always hits
    some of it in flight and finds some of it done, with fifty leads as with a thousand.
    """
    concurrency = min(max(leads // (processes * WAVES), 1), Settings().threads)
    waves = leads / (concurrency * processes)
    return concurrency, min(max(WAVES_TAKE_SECONDS / waves, 0.02), 1.0)


# -- the run itself ----------------------------------------------------------------------------------


def _perform(stage: Stage, options: Options, console: Console, interruption: Interruption) -> Report:
    _enqueue(stage, options, console, interruption)
    stage.workers.start()
    kills = Kills(stage.connection, stage.workers, len(stage.intake.accepted))
    with Display(console, len(stage.intake.accepted)) as display:
        display.say(f"Started a supervisor, --processes {options.processes}.")
        problems = _wait_until_all_ended(stage, kills, display, interruption)
    report = report_of(_facts(stage, kills), problems)
    if options.json:
        click.echo(report.to_json())
        for problem in report.problems:
            console.print(f"Problem: {problem}", markup=False, highlight=False, soft_wrap=True)
    else:
        show(report, console)
    return report


def _enqueue(stage: Stage, options: Options, console: Console, interruption: Interruption) -> None:
    intake = stage.intake
    leads = take_in(options.leads, welcome_lead.signature, intake)
    started = time.monotonic()
    with Client(stage.url) as client:
        for _ in client.enqueue_many(welcome_lead, leads, key=lambda lead: lead.id):
            interruption.check()
    seconds = time.monotonic() - started
    console.print(
        f"Enqueued {len(intake.accepted):,} runs in {seconds:.1f} s, from {intake.rows:,} rows: "
        f"{len(intake.rejected):,} rejected, {intake.duplicates:,} duplicates.",
        highlight=False,
        soft_wrap=True,
    )
    for reason in intake.rejected[:3]:
        console.print(f"  rejected: {reason}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _wait_until_all_ended(
    stage: Stage, kills: Kills, display: Display, interruption: Interruption
) -> list[str]:
    """Watch the runs and strike when it is time; return what kept them from ending, if anything did."""
    seen, changed_at = (-1, -1), time.monotonic()
    while True:
        looked_at = time.monotonic()
        row = stage.connection.execute(load("progress")).fetchone()
        assert row is not None
        total, ended, blocked = row
        display.show(ended)
        happened = kills.tick(ended)
        if happened:
            display.say(happened)
        if ended + blocked == total and not kills.pending:
            return []
        now = time.monotonic()
        if (ended, blocked) != seen or happened:
            seen, changed_at = (ended, blocked), now
        if stage.workers.pid is None:
            # A signal to the whole group may have reached them first.
            interruption.sleep(SIGNALS_SETTLE_SECONDS)
            return [
                f"the workers have ended by themselves; their log ends with:\n{log_end(stage.workers.log)}"
            ]
        if now - changed_at > STUCK_AFTER_SECONDS:
            return [
                f"no run has ended for {STUCK_AFTER_SECONDS:.0f} s; the workers' log ends with:\n{log_end(stage.workers.log)}"
            ]
        # Counting a hundred thousand runs takes a while: leave most of the time to the workers.
        interruption.sleep(max(POLL_SECONDS, 4 * (now - looked_at)))


# -- what came of it ---------------------------------------------------------------------------------


def _facts(stage: Stage, kills: Kills) -> Facts:
    def rows(query: str) -> list[tuple[Any, ...]]:
        return stage.connection.execute(load(query)).fetchall()

    intake = stage.intake
    return Facts(
        rows=intake.rows,
        rejected=intake.rejected,
        duplicates=intake.duplicates,
        leads={lead.id: lead.email for lead in intake.accepted.values()},
        ends={lead: (run_id, state) for lead, run_id, state in rows("ends")},
        messages=list(stage.maildir.messages()),
        crm_rows=dict(rows("crm_rows")),
        unanswered={
            run_id: Unanswered(sends, interrupted) for run_id, sends, interrupted in rows("executions")
        },
        tasks_left=rows("leftovers")[0][0],
        seconds=rows("pace")[0][0],
        kills=kills.results(),
    )


def _print_what_is_up(stage: Stage, console: Console) -> None:
    console.print("\n[bold]Everything is still up.[/] Look at it from another terminal:")
    for what, command in (
        ("the database", f"psql '{stage.url}'"),
        ("the runs", f"STEPWELL_DATABASE_URL='{stage.url}' stepwell runs list"),
        ("the metrics", f"curl http://localhost:{stage.metrics_port}/metrics"),
        ("the mailbox", f"ls {stage.maildir.path}{os.sep}new"),
        ("the workers' log", f"tail -f {stage.workers.log}"),
    ):
        console.print(f"  {what:17} {command}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Ctrl-C here (or kill {os.getpid()}) ends it all and deletes it.", highlight=False)
