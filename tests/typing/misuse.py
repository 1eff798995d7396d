"""What type checkers must refuse: every line that ends in `# refused`, and no other. It is never executed."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from outbox import Client
from worker import step, transaction, workflow


@dataclass
class Lead:
    id: int


@step
async def send(lead: Lead) -> str:
    return ""


@step
def score(lead: Lead) -> float:
    return 1.0


@transaction
def save(session: Session, lead: Lead) -> int:
    return lead.id


@workflow
async def welcome(lead: Lead, session: Session) -> None:
    await send("ada")  # refused
    await send()  # refused
    await send(lead, 1)  # refused
    send(lead).upper()  # refused
    await score(lead)  # refused
    score(leads=lead)  # refused
    save(session, lead)  # refused
    save("ada")  # refused
    number: int = await send(lead)  # refused
    assert number
    Client().state(17)  # refused
    Client().state(welcome)  # refused


step(timeout="5")  # refused
step(on_crash="ignore")  # refused
step(raises=int)  # refused
transaction(verify=score)  # refused
workflow(queue=3)  # refused
