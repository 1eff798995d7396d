"""A person approves an expense: wait for days, remind every day, give up after three; or it is withdrawn.

    stepwell worker examples/approval.py
    stepwell enqueue approve_expense '{"expense": {"employee": "Ada", "amount": "99.90", "purpose": "train"}}'
    stepwell runs state RUN
    stepwell signal RUN decision '{"approved": true, "by": "Grace"}'

RUN is the id that `enqueue` has printed. A run that waits costs no process anything, and survives all of them.
"""

from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal

from outbox import PayloadError
from worker import current_run, first, set_state, step, wait_signal, workflow

DAYS = 3


@dataclass
class Expense:
    employee: str
    amount: Decimal
    purpose: str


@dataclass
class Decision:
    approved: bool
    by: str
    comment: str = ""


def deliver(to: str, text: str) -> None:
    """Stands for your chat or mail client."""
    print(f"message to {to}: {text}")


@step
async def ask(expense: Expense, day: int) -> None:
    again = f"Reminder {day}: " if day else ""
    question = f"{again}{expense.employee} asks for {expense.amount} ({expense.purpose})"
    deliver("the approvers", f"{question}; answer by `stepwell signal {current_run().id} decision …`")


@step
async def tell_outcome(expense: Expense, outcome: str) -> None:
    deliver(expense.employee, f"Your expense was {outcome}")


async def decided(expense: Expense) -> str:
    """Return the outcome. Functions that a body calls are part of the plan, and replayed with it."""
    day = 0
    while day < DAYS:
        await ask(expense, day)
        set_state("waits", f"for a decision, day {day + 1} of {DAYS}")
        try:
            which, said = await first(
                wait_signal("decision", type=Decision, timeout=timedelta(days=1)),
                wait_signal("withdraw"),
            )
        except TimeoutError:
            day += 1
        except PayloadError as error:  # somebody has sent something else; ask again
            set_state("problem", str(error))
        else:
            if which == 1:
                return "withdrawn"
            return f"{'approved' if said.approved else 'rejected'} by {said.by}"
    return f"not decided in {DAYS} days"


@workflow
async def approve_expense(expense: Expense) -> str:
    outcome = await decided(expense)
    set_state("waits", "for nothing")
    await tell_outcome(expense, outcome)
    return outcome
