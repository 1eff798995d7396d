"""A report every night, by one run that never ends: it sleeps, asks its sources side by side, writes, starts anew.

    stepwell worker examples/report.py
    stepwell enqueue nightly_report '{"directory": "/var/tmp"}' --key nightly
    stepwell runs show RUN

The key keeps a second one from being started. `continue_as` begins each night with an empty history, under the same id.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from uuid import UUID

from tenacity import stop_after_delay

from worker import call, continue_as, gather, now, random, retrying, sleep_until, step, uuid, workflow

UNTIL_MORNING = retrying(stop=stop_after_delay(4 * 3600))


@dataclass
class Figures:
    orders: int
    visits: int
    tickets: list[str]


# What the three sources answer is made up of the hours; yours would ask the shop, the web server and the help desk.
@step(retry=UNTIL_MORNING)
def count_orders(since: datetime, until: datetime) -> int:
    return round((until - since) / timedelta(hours=1)) * 3


@step(retry=UNTIL_MORNING)
async def count_visits(since: datetime, until: datetime) -> int:
    return round((until - since) / timedelta(hours=1)) * 250


@step(retry=UNTIL_MORNING)
async def open_tickets(until: datetime) -> list[str]:
    return [f"asked on a {until:%A}"]


@step
def write_report(directory: str, until: datetime, figures: Figures, number: UUID) -> str:
    path = Path(directory, f"report-{until:%Y-%m-%d}.txt")
    tickets = "\n".join(f"- {each}" for each in figures.tickets)
    text = f"until {until:%c}: {figures.orders} orders, {figures.visits} visits\n{tickets}\nreport {number}\n"
    path.write_text(text, encoding="utf-8")  # the same when it is written twice, after a crash in between
    return str(path)


def next_night(moment: datetime) -> datetime:
    """Return the next two o'clock (UTC)."""
    tonight = moment.replace(hour=2, minute=0, second=0, microsecond=0)
    return tonight if moment < tonight else tonight + timedelta(days=1)


@workflow
async def nightly_report(directory: str, since: datetime | None = None) -> None:
    # now(), random() and uuid() answer the same in every replay of this night.
    since = since or now()
    await sleep_until(next_night(since) + timedelta(minutes=30 * random()))
    until = now()
    orders, visits, tickets = await gather(
        call(count_orders, since, until), count_visits(since, until), open_tickets(until)
    )
    write_report(directory, until, Figures(orders, visits, tickets), uuid())
    # The next report begins where this one ends, also after a night without workers.
    continue_as(directory, until)
