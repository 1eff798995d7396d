"""Welcome a lead: a step that is tried again, a transaction that happens exactly once, and a key.

    stepwell worker examples/welcome.py
    stepwell enqueue create_crm --wait
    stepwell enqueue welcome_lead '{"lead": {"id": 1, "name": "Ada", "email": "ada@example.com"}}' --key 1 --wait

The last command a second time enqueues nothing: its key is known. Kill the worker with `kill -9` whenever you like;
another one goes on at the first step that is not recorded.
"""

from dataclasses import dataclass

import psycopg
from tenacity import stop_after_attempt, wait_exponential_jitter

from worker import retrying, step, transaction, workflow


@dataclass
class Lead:
    id: int
    name: str
    email: str


def deliver(to: str, text: str) -> None:
    """Stands for your mail provider's client."""
    print(f"mail to {to}: {text}")


@step(retry=retrying(stop=stop_after_attempt(5), wait=wait_exponential_jitter(1, 60), on=ConnectionError))
async def send_welcome(lead: Lead) -> None:
    deliver(lead.email, f"Welcome, {lead.name}!")


@transaction  # its writes and the record of the step commit together
def save_to_crm(connection: psycopg.Connection, lead: Lead) -> int:
    connection.execute(
        "insert into crm_leads (id, name, email) values (%s, %s, %s)", (lead.id, lead.name, lead.email)
    )
    return lead.id


@workflow
async def welcome_lead(lead: Lead) -> int:
    await send_welcome(lead)
    return save_to_crm(lead)


@transaction
def create_crm_tables(connection: psycopg.Connection) -> None:
    connection.execute("create table if not exists crm_leads (id int primary key, name text, email text)")


@workflow
async def create_crm() -> None:
    """Make the table of this example; in a project of your own a migration does that."""
    create_crm_tables()
