"""`stepwell worker`: a supervisor with its worker processes, and the exporter beside it."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from outbox.database import direct_url
from outbox.settings import Settings
from worker.cli.connecting import database
from worker.cli.options import database_option, duration
from worker.telemetry.files import shared_directory
from worker.telemetry.logs import LogFormat, set_up_logs

if TYPE_CHECKING:
    from worker.supervision.supervisor import Supervisor

logger = logging.getLogger(__name__)

_LEVELS = ("debug", "info", "warning", "error")


@click.command()
@click.argument("app")
@click.option(
    "--processes", type=click.IntRange(1, 1000), default=1, show_default=True, help="Worker processes."
)
@click.option("--concurrency", type=click.IntRange(1), help="Runs in flight per process.  [default: 200]")
@click.option(
    "--queue", "queues", multiple=True, default=("default",), show_default=True, help="Can be repeated."
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    help="Serve /metrics, /healthz, /readyz; 0: any free port.",
)
@click.option("--metrics-host", default="0.0.0.0", show_default=True, help="The address to serve them on.")  # noqa: S104 - to be scraped
@click.option(
    "--grace-seconds",
    callback=duration,
    metavar="TIME",
    help="How long a drain lets executions end.  [default: 30]",
)
@click.option(
    "--log-level", type=click.Choice(_LEVELS), default="info", show_default=True, help="What to log."
)
@click.option(
    "--log-format",
    type=click.Choice(("text", "json")),
    default="text",
    show_default=True,
    envvar="STEPWELL_LOG_FORMAT",
    show_envvar=True,
    help="Lines for people, or JSON with run, step and trace.",
)
@database_option
def worker(
    settings: Settings,
    app: str,
    processes: int,
    queues: tuple[str, ...],
    metrics_port: int | None,
    metrics_host: str,
    log_level: str,
    log_format: LogFormat,
    **tuned: Any,
) -> None:
    """Run workers for the workflows of APP, a module (shop.flows) or a file (flows.py).

    SIGTERM and Ctrl-C drain: nothing more is claimed, executions may end within the grace time, the rest is
    given back. A second one stops at once. Under systemd (Type=notify) it tells when it is ready, alive and ending.
    """
    set_up_logs(log_level.upper(), log_format)
    settings = replace(settings, **{name: value for name, value in tuned.items() if value is not None})
    with ExitStack() as stack:
        # First of all: prometheus_client decides where values live when it is imported, which supervisors do.
        directory = stack.enter_context(shared_directory()) if metrics_port is not None else None
        url = stack.enter_context(database(settings))
        from worker.supervision.supervisor import Supervisor
        from worker.supervision.systemd import NotifySocket, run_and_tell

        systemd = NotifySocket.from_environment()
        supervisor = Supervisor(
            settings,
            url,
            app=app,
            processes=processes,
            queues=list(dict.fromkeys(queues)),
            log_format=log_format,
        )
        if directory is not None and metrics_port is not None:
            from worker.telemetry.exporter import Exporter

            exporter = Exporter(
                direct_url(settings, url),
                directory=directory,
                host=metrics_host,
                port=metrics_port,
                not_ready=_not_ready(supervisor),
                is_alive=lambda: supervisor.vitals().alive,
            )
            stack.enter_context(exporter)
            logger.info("serving %s/metrics, /healthz and /readyz", exporter.address)
        status = asyncio.run(run_and_tell(supervisor, systemd))
    if supervisor.complaint:
        click.echo(f"stepwell: {' '.join(supervisor.complaint.split())}", err=True)
    sys.exit(status)


def _not_ready(supervisor: Supervisor) -> Callable[[], list[str]]:
    def reasons() -> list[str]:
        seen = supervisor.vitals()
        said = []
        if not seen.alive:
            said.append("the supervisor's event loop does not answer")
        if not seen.connected:
            said.append("the supervisor has no database session")
        elif not seen.schema_ok:
            said.append("the schema is missing or too old: run `stepwell migrate`")
        if not any(
            child.vitals and child.vitals.claiming and child.vitals.connected for child in seen.children
        ):
            said.append("no worker process is claiming")
        return said

    return reasons
