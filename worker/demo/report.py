"""Judge a run of the demo by what it left behind, and say so.

Pure: the facts come from the database, from the Maildir and from the scenario; see `scenario`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from rich.console import Console
from rich.table import Table
from rich.text import Text

from worker.demo.maildir import Message

EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Kill:
    """One SIGKILL of the scenario. `claims` is what the killed held, `recovery_seconds` None if never freed."""

    what: str
    claims: int
    recovery_seconds: float | None


@dataclass(frozen=True, slots=True)
class Unanswered:
    """The executions of one run that gave no result."""

    sends: int
    interrupted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was put in and what is there now."""

    rows: int
    rejected: Sequence[str]
    duplicates: int
    leads: Mapping[int, str]
    """Lead id → mail address, for each lead that was enqueued."""
    ends: Mapping[int, tuple[UUID, str]]
    """Lead id → its run and the state of that."""
    messages: Sequence[Message]
    crm_rows: Mapping[int, int]
    """Lead id → rows in the CRM."""
    unanswered: Mapping[UUID, Unanswered]
    tasks_left: int
    seconds: float | None
    kills: Sequence[Kill]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came of the leads. `problems` is empty if each was welcomed once and is in the CRM once."""

    leads: int
    rejected: int
    duplicates: int
    succeeded: int
    messages: int
    duplicate_messages: int
    crm_rows: int
    kills: Sequence[Kill]
    interrupted: int
    found_sent: int
    """Interrupted or failed sends that `verify` found to have arrived, and did not repeat."""
    seconds: float | None
    problems: Sequence[str]

    @property
    def ok(self) -> bool:
        """Tell whether every valid lead was welcomed once and saved once, and nothing is stuck."""
        return not self.problems

    @property
    def recovery_seconds(self) -> float | None:
        """Return the longest time from a kill until the killed held nothing any more."""
        known = [kill.recovery_seconds for kill in self.kills if kill.recovery_seconds is not None]
        return max(known) if known else None

    @property
    def runs_per_second(self) -> float | None:
        """Return the pace from the first claim to the last end, kills included."""
        return self.succeeded / self.seconds if self.seconds else None

    def to_json(self) -> str:
        """Return the report as one JSON object on one line."""
        shown: dict[str, Any] = {
            "leads": self.leads,
            "rejected": self.rejected,
            "duplicates": self.duplicates,
            "succeeded": self.succeeded,
            "messages": self.messages,
            "duplicate_messages": self.duplicate_messages,
            "crm_rows": self.crm_rows,
            "kills": len(self.kills),
            "recovery_seconds": _rounded(self.recovery_seconds),
            "runs_per_second": _rounded(self.runs_per_second),
        }
        return json.dumps(shown)


def report_of(facts: Facts, problems: Iterable[str] = ()) -> Report:
    """Judge the facts; `problems` are those that the scenario met on the way."""
    expected = {address: lead for lead, address in facts.leads.items()}
    addressed = Counter(message.recipient for message in facts.messages)
    sent = {run_of(message): message.execution for message in facts.messages}
    return Report(
        leads=facts.rows,
        rejected=len(facts.rejected),
        duplicates=facts.duplicates,
        succeeded=sum(state == "succeeded" for _, state in facts.ends.values()),
        messages=len(facts.messages),
        duplicate_messages=len(facts.messages) - len(addressed),
        crm_rows=sum(facts.crm_rows.values()),
        kills=facts.kills,
        interrupted=sum(each.interrupted for each in facts.unanswered.values()),
        found_sent=sum(0 < sent.get(str(run), 0) <= each.sends for run, each in facts.unanswered.items()),
        seconds=facts.seconds,
        problems=[*problems, *_problems(facts, expected, addressed)],
    )


def run_of(message: Message) -> str:
    """Return the id of the run that sent a message: its idempotency key begins with it."""
    return message.message_id.strip("<>").partition("_")[0]


def _problems(facts: Facts, expected: Mapping[str, int], addressed: Mapping[str, int]) -> Iterator[str]:
    states = {lead: facts.ends[lead][1] if lead in facts.ends else "missing" for lead in facts.leads}
    unfinished = {lead: state for lead, state in states.items() if state != "succeeded"}
    for state in sorted(set(unfinished.values())):
        of_state = [lead for lead, its in unfinished.items() if its == state]
        yield f"{_leads(of_state)} with a run that is {state}, not succeeded"
    yield from _sentence(
        "without a message", (lead for address, lead in expected.items() if address not in addressed)
    )
    yield from _sentence(
        "with several messages", (expected[a] for a, n in addressed.items() if n > 1 and a in expected)
    )
    if strays := [address for address in addressed if address not in expected]:
        yield f"{len(strays):,} addresses with a message that are no lead's: {_examples(strays)}"
    yield from _sentence(
        "without a row in crm.leads", (lead for lead in facts.leads if lead not in facts.crm_rows)
    )
    yield from _sentence(
        "with several rows in crm.leads", (lead for lead, n in facts.crm_rows.items() if n > 1)
    )
    yield from _sentence(
        "in crm.leads that were never enqueued", (lead for lead in facts.crm_rows if lead not in facts.leads)
    )
    if len(facts.ends) != len(facts.leads):
        yield f"{len(facts.ends):,} runs for {len(facts.leads):,} leads"
    if facts.tasks_left:
        yield f"{facts.tasks_left:,} tasks are left over"
    if any(kill.recovery_seconds is None for kill in facts.kills):
        yield "tasks are still claimed by a worker that was killed"


def _sentence(what: str, leads: Iterable[int]) -> Iterator[str]:
    found = list(leads)
    if found:
        yield f"{_leads(found)} {what}"


def _leads(leads: Sequence[int]) -> str:
    return f"{len(leads):,} lead{'s' if len(leads) > 1 else ''} ({_examples(leads)})"


def _examples(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values[:EXAMPLES]) + (", …" if len(values) > EXAMPLES else "")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def show(report: Report, console: Console) -> None:
    """Print the report for people."""
    table = Table(title="What came of the leads", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    valid = report.leads - report.rejected - report.duplicates
    table.add_row("rows read", f"{report.leads:,}", "")
    table.add_row("rejected", f"{report.rejected:,}", "are no lead, such as for want of an address")
    table.add_row("duplicates", f"{report.duplicates:,}", "lead ids that were there already")
    table.add_row("succeeded", f"{report.succeeded:,}", f"runs, of {valid:,} leads")
    table.add_row("messages", f"{report.messages:,}", "in the Maildir")
    table.add_row("duplicate messages", f"{report.duplicate_messages:,}", "")
    table.add_row("rows in crm.leads", f"{report.crm_rows:,}", "")
    table.add_section()
    for kill in report.kills:
        recovery = "never" if kill.recovery_seconds is None else f"{kill.recovery_seconds:.2f} s"
        table.add_row("recovery", recovery, f"after kill -9 of {kill.what} with {tasks(kill.claims)}")
    table.add_row("interrupted", f"{report.interrupted:,}", "executions that never answered")
    table.add_row(
        "found sent",
        f"{report.found_sent:,}",
        "of these by verify, and not sent again",
    )
    if report.runs_per_second is not None:
        table.add_row(
            "pace", f"{report.runs_per_second:,.0f}/s", f"runs in {report.seconds:,.1f} s, kills included"
        )
    console.print(table)
    if report.ok:
        console.print("[bold green]Every lead was welcomed once and is in the CRM once.[/]")
    for problem in report.problems:
        console.print(Text.assemble(("Problem: ", "bold red"), problem), soft_wrap=True)


def tasks(count: int) -> str:
    """Return "1 task", "2 tasks"."""
    return "1 task" if count == 1 else f"{count:,} tasks"
