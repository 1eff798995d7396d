"""Pay, although a process may die between the payment and its record: ask the provider, or have a person look.

    stepwell worker examples/payment.py
    stepwell enqueue settle_invoice '{"invoice": {"id": 1, "card": "4242", "amount": 900, "supplier": "ACME"}}' --wait

A card provider can be asked about a payment, so `verify` does that before the card is charged again. The bank of the
supplier cannot: after a crash in the transfer the run is blocked, and a person finds out what has happened and says so.

    stepwell runs list --status blocked
    stepwell runs resolve RUN 2 --value '"sent on Monday, seen on the account"'
    stepwell runs retry RUN

`resolve` says how the step at path 2 ended, and it is not executed again; `retry` executes it again. Whoever is on call is
told by a hook for events, in the worker process in which it happens.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from tenacity import stop_after_attempt, wait_fixed

from worker import (
    NOT_DONE,
    Permanent,
    RetryAfter,
    StepFailed,
    current_step,
    events,
    on_event,
    retrying,
    step,
    workflow,
)

PROVIDER = Path(tempfile.gettempdir(), "stepwell-example-payments")
"""Stands for the card provider: a directory with a file for each payment, named by its idempotency key."""


@dataclass
class Invoice:
    id: int
    card: str
    amount: int
    supplier: str


@dataclass
class CardDeclinedError(Exception):
    """An error of business. The body gets it back as it is, because the step names it in `raises`."""

    reason: str


def receipt_of_this_step() -> Path:
    return PROVIDER / current_step().idempotency_key.replace(":", "-")


def charged_already(invoice: Invoice) -> object:  # noqa: ARG001 - it has the parameters of its step
    """Ask before every execution but the first. It cannot see a payment that arrives after the question."""
    receipt = receipt_of_this_step()
    return receipt.name if receipt.exists() else NOT_DONE


@step(
    verify=charged_already,
    raises=CardDeclinedError,
    timeout=30,
    retry=retrying(stop=stop_after_attempt(5), wait=wait_fixed(10), on=ConnectionError),
)
def charge_card(invoice: Invoice) -> str:
    if invoice.card == "empty":
        raise CardDeclinedError("no money left")
    if invoice.card == "busy" and current_step().execution == 1:
        raise RetryAfter(60, "the provider asks for a minute")
    receipt = receipt_of_this_step()
    receipt.parent.mkdir(exist_ok=True)
    receipt.write_text(f"{invoice.amount} by card {invoice.card}", encoding="utf-8")
    return receipt.name


@step(on_crash="hold", retry=retrying(stop=stop_after_attempt(3), wait=wait_fixed(3600)))
async def transfer(invoice: Invoice) -> str:
    """Stands for a bank that knows no idempotency keys and cannot be asked."""
    if invoice.supplier == "nobody":
        raise Permanent("there is no such account")  # trying again cannot help
    print(f"bank: {invoice.amount} to {invoice.supplier}")
    return "sent"


@workflow
async def settle_invoice(invoice: Invoice) -> str:
    try:
        charge_card(invoice)
    except CardDeclinedError as declined:
        return f"declined: {declined.reason}"
    try:
        return await transfer(invoice)
    except StepFailed as failed:
        return f"not transferred: {failed.message}"


@on_event
def call_somebody(event: events.Event) -> None:
    """Stands for a pager, a chat channel, or an error tracker."""
    if isinstance(event, events.RunBlocked):
        print(f"pager: {event.workflow} {event.run_id} needs a person: {event.reason}")
