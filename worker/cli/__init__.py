"""The command `stepwell`: one file for each group of commands.

A command's file is imported when the command is named, so that `stepwell enqueue` does not wait for the
imports of a worker, and one whose extra is not installed says so without disturbing the others.

Exit statuses: 0 ok · 1 what was asked for failed · 2 a mistake of the caller's. Both print one sentence on
stderr; `worker.cli.mistakes` says which error is which. A traceback means a bug of ours.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from typing import Any, NoReturn

import click

# Name → where the command is, and what it does, for --help without importing it.
_COMMANDS = {
    "demo": ("worker.cli.demo:demo", "Welcome a thousand leads, kill the workers on the way, and count."),
    "migrate": ("worker.cli.migrate:migrate", "Install Stepwell's schema, or bring it up to date."),
    "worker": (
        "worker.cli.worker:worker",
        "Run workers for the workflows of APP until they are told to stop.",
    ),
    "enqueue": ("worker.cli.enqueue:enqueue", "Enqueue a run of WORKFLOW, or one for each row of a file."),
    "signal": ("worker.cli.exchanging:signal", "Send a signal to a run, which takes it by wait_signal."),
    "runs": ("worker.cli.runs:runs", "List, show, follow, repair and export runs."),
    "forget": ("worker.cli.forget:forget", "Erase what came in under an idempotency key."),
    "encryption": ("worker.cli.encryption:encryption", "Make keys for payloads, and tell which are in use."),
    "replay": ("worker.cli.replay:replay", "Drive recorded histories against the code of APP: would it fit?"),
    "check": ("worker.cli.check:check", "Find in the workflow bodies of APP what a replay could not repeat."),
}
_EXTRAS = {"demo": "demo"}


def _version() -> str:
    try:
        return importlib.metadata.version("stepwell")
    except importlib.metadata.PackageNotFoundError:
        return "unknown, not installed"


class _Commands(click.Group):
    """A group that imports its commands when they are used, and tells errors of theirs in one sentence."""

    def invoke(self, ctx: click.Context) -> Any:
        from worker.cli.mistakes import told

        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, click.ClickException):
            raise
        except ModuleNotFoundError as error:
            if ctx.invoked_subcommand not in _EXTRAS:
                raise
            _stop(_lacking(ctx.invoked_subcommand, error), 2)
        except Exception as error:
            known = told(error)
            if known is None:
                raise
            click.echo(f"stepwell: {known.sentence}", err=True)
            ctx.exit(known.status)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - as click calls it
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - as above
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        try:
            command = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            if cmd_name not in _EXTRAS:
                raise
            return _unavailable(cmd_name, _lacking(cmd_name, error))
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - as above
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])


def _lacking(name: str, error: ImportError) -> str:
    return f'{name} needs more than is installed ({error}): pip install "stepwell[{_EXTRAS[name]}]"'


def _unavailable(name: str, sentence: str) -> click.Command:
    """Return a command that says which extra it needs."""

    @click.command(name, context_settings={"ignore_unknown_options": True}, add_help_option=False)
    @click.argument("anything", nargs=-1, type=click.UNPROCESSED)
    def unavailable(anything: tuple[str, ...]) -> None:  # noqa: ARG001 - whatever the real one takes
        _stop(sentence, 2)

    return unavailable


def _stop(sentence: str, status: int) -> NoReturn:
    click.echo(f"stepwell: {sentence}", err=True)
    sys.exit(status)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="stepwell")
def main() -> None:
    """Durable workflows on Postgres.

    Every command uses the database of --database-url or STEPWELL_DATABASE_URL, or else a Postgres of its own
    in the directory .stepwell.
    """
