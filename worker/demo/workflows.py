"""Welcome a lead: a mail that must go out once, and a row in the CRM that must be there once.

Run by ``stepwell worker worker.demo.workflows``. Where the mail provider is comes from the environment:
``STEPWELL_DEMO_SMTP`` (host:port) and ``STEPWELL_DEMO_MAILDIR`` (what it has stored).
"""

from __future__ import annotations

import os
import smtplib
from dataclasses import dataclass
from datetime import datetime
from email.message import EmailMessage
from typing import Annotated, Literal

from msgspec import Meta
from sqlalchemy import MetaData
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from tenacity import stop_after_attempt, wait_exponential_jitter

from worker import NOT_DONE, Permanent, current_step, retrying, step, transaction, workflow
from worker.demo.maildir import Maildir

SMTP_TIMEOUT_SECONDS = 30.0
DOMAIN = "stepwell.example"

Source = Literal[
    "website", "webinar", "referral", "google-ads", "newsletter", "trade-fair", "linkedin", "partner"
]


@dataclass(frozen=True)
class Lead:
    """Somebody who has asked about the product."""

    id: Annotated[int, Meta(ge=1)]
    name: Annotated[str, Meta(min_length=1, max_length=200)]
    email: Annotated[str, Meta(pattern=r"^[^@\s]+@[^@\s]+\.[^@\s.]+$", max_length=254)]
    source: Source
    locale: Annotated[str, Meta(pattern=r"^[a-z]{2}-[A-Z]{2}$")]
    country: Annotated[str, Meta(pattern=r"^[A-Z]{2}$")]
    signed_up_at: datetime
    phone: str | None = None
    company: str | None = None


class Base(DeclarativeBase):
    """The tables of the CRM."""

    metadata = MetaData(schema="crm")


class CrmLead(Base):
    """A lead as the CRM knows it. Nothing in the table keeps a lead from being there twice."""

    __tablename__ = "leads"

    id: Mapped[int] = mapped_column(primary_key=True)
    lead_id: Mapped[int]
    name: Mapped[str]
    email: Mapped[str]
    phone: Mapped[str | None]
    company: Mapped[str | None]
    source: Mapped[str]
    locale: Mapped[str]
    country: Mapped[str]
    signed_up_at: Mapped[datetime]


def message_id() -> str:
    """Return the Message-ID of this step: the same in every execution of it, and of no other."""
    return f"<{client_name()}@{DOMAIN}>"


def client_name() -> str:
    """Return what this step calls itself in EHLO: its idempotency key, in characters that mail allows."""
    return current_step().idempotency_key.replace(":", "_")


def already_sent(_lead: Lead) -> object:
    """Find out whether an earlier execution got its message through, although nobody recorded it.

    That execution may have died with its last byte on the way, so first the provider must have done with
    its connection. What this cannot see is an execution that has not connected yet: a worker that was
    frozen before its first byte and wakes up after the question.
    """
    maildir = Maildir(_configured("STEPWELL_DEMO_MAILDIR"))
    maildir.wait_until_closed(client_name(), SMTP_TIMEOUT_SECONDS)
    return message_id() if maildir.find(message_id()) else NOT_DONE


@step(
    retry=retrying(stop=stop_after_attempt(5), wait=wait_exponential_jitter(max=10)),
    verify=already_sent,
)
def send_welcome(lead: Lead) -> str:
    """Send the welcome mail and return its Message-ID."""
    host, _, port = _configured("STEPWELL_DEMO_SMTP").rpartition(":")
    with smtplib.SMTP(host, int(port), local_hostname=client_name(), timeout=SMTP_TIMEOUT_SECONDS) as smtp:
        smtp.send_message(welcome_mail(lead))
    return message_id()


@transaction
def save_to_crm(session: Session, lead: Lead) -> int:
    """Put the lead into the CRM and return its number there."""
    row = CrmLead(
        lead_id=lead.id,
        name=lead.name,
        email=lead.email,
        phone=lead.phone,
        company=lead.company,
        source=lead.source,
        locale=lead.locale,
        country=lead.country,
        signed_up_at=lead.signed_up_at,
    )
    session.add(row)
    session.flush()
    return row.id


@workflow
async def welcome_lead(lead: Lead) -> int:
    """Welcome one lead and put it into the CRM."""
    send_welcome(lead)
    return save_to_crm(lead)


def welcome_mail(lead: Lead) -> EmailMessage:
    """Return the message, with the execution that sends it in a header for the report."""
    mail = EmailMessage()
    mail["Subject"] = f"Welcome, {lead.name}"
    mail["From"] = f"Stepwell Demo <welcome@{DOMAIN}>"
    mail["To"] = lead.email
    mail["Message-ID"] = message_id()
    mail["X-Execution"] = str(current_step().execution)
    mail.set_content(f"Dear {lead.name},\n\nthank you for your interest. We will be in touch.\n")
    return mail


def _configured(variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise Permanent(f"{variable} is not set: this workflow needs the mail provider of `stepwell demo`")
    return value
