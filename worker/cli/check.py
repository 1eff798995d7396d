"""`stepwell check`: what a replay could not repeat, found in the source."""

from __future__ import annotations

import dataclasses
import sys

import click

from worker import lint
from worker.cli.mistakes import FAILED
from worker.cli.rendering import print_json
from worker.lint.formats import as_annotation, as_line, summary


@click.command()
@click.argument("apps", metavar="APP…", nargs=-1)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "github", "json"]),
    default="text",
    show_default=True,
    help="github marks the lines of a pull request.",
)
@click.option("--rules", "list_rules", is_flag=True, help="List the rules and do nothing else.")
def check(apps: tuple[str, ...], form: str, list_rules: bool) -> None:
    """Find in the workflow bodies of APP what a replay could not repeat.

    APP is a module (shop.flows), a file (flows.py) or a directory. It is read and never imported. The helper
    functions of its package that bodies call are checked too; steps are not, effects are what they are for.
    `# stepwell: ignore[rule]` silences a rule on its line. Status 1 if there are findings.
    """
    if list_rules:
        _list_rules()
        return
    if not apps:
        raise click.UsageError("Missing argument 'APP…': a module, a file or a directory.")
    report = lint.check(apps)
    if form == "json":
        print_json(dataclasses.asdict(report))
    else:
        for finding in report.findings:
            click.echo(as_annotation(finding) if form == "github" else as_line(finding))
    click.echo(summary(report), err=True)
    if report.findings:
        sys.exit(FAILED)


def _list_rules() -> None:
    width = max(map(len, lint.RULES))
    for rule in lint.RULES.values():
        click.echo(f"{rule.id:{width}}  {rule.finds}")
