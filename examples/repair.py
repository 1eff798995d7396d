"""Invoices of a month: a provider that is down, a wrong rate, a stop in the middle. Runs are repaired, one and many.

    stepwell worker examples/repair.py
    stepwell enqueue bill_customer '{"customer": {"id": 1, "country": "NO", "amount": 100}}'
    stepwell runs retry --workflow bill_customer --state failed --error-like rate --yes
    stepwell runs pause RUN
    stepwell runs resume RUN
    stepwell runs show RUN

Put the rates of exchange beside the worker first: `echo '{"NO": 0.085}' > rates.json`. Without them every run fails at its
first step; `retry` goes on with all of them once the file is there. When the file was wrong, a run that has ended is
rewound to the call from which on all is to be made anew; `fork` tries another input with what was done so far.

Handles do the same from Python: `repair_month` is a service of an accountant, no workflow.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outbox import Run
from worker import gather, sleep, start, step, workflow

RATES = Path("rates.json")


@dataclass
class Customer:
    id: int
    country: str
    amount: int


@step
def rate_of(country: str) -> float:
    try:
        return float(json.loads(RATES.read_text(encoding="utf-8"))[country])
    except (OSError, KeyError) as error:
        raise LookupError(f"no rate for {country}: {error!r}") from error


@step
async def write_invoice(customer: Customer, rate: float) -> str:
    return f"invoice {customer.id}: {customer.amount * rate:.2f} EUR"


@step
async def send_invoice(invoice: str) -> str:
    """Stands for a mail provider."""
    print(f"sent: {invoice}")
    return invoice


@workflow
async def bill_customer(customer: Customer) -> str:
    rate = rate_of(customer.country)
    await sleep(2)  # so that a pause finds something to pause
    invoice = await write_invoice(customer, rate)
    return await send_invoice(invoice)


@workflow
async def bill_month(customers: list[Customer]) -> list[str]:
    """Bill each customer by a run of its own. A handle may be awaited in a join, and once more later."""
    bills = [start(bill_customer, customer) for customer in customers]
    await gather(*bills, return_errors=True)  # all of them have ended
    sent = []
    for bill in bills:
        try:
            sent.append(await bill)
        except Exception as error:  # noqa: BLE001 - a bill that was not sent is told of
            sent.append(f"not sent: {error}")
    return sent


def repair_month(failed: Sequence[Run[Any]], wrong: Run[Any]) -> Run[Any]:
    """Retry what has failed, and make anew from the rate on what was sent with a wrong one.

    Returns a run that tells what the wrong rate was, by an invoice over 1.
    """
    for run in failed:
        run.retry()
    trial = wrong.fork("2", input={"customer": {"id": 0, "country": "NO", "amount": 1}})
    wrong.rewind("1")
    return trial
