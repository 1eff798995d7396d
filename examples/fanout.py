"""Fan out over a CSV: check all rows at once, mail statements five at a time, and sum up what went wrong.

    stepwell worker examples/fanout.py
    stepwell enqueue send_statements '{"path": "examples/customers.csv"}'
    stepwell runs state RUN
    stepwell runs show RUN

RUN is the id that `enqueue` has printed. Steps side by side are spread over all workers. What one of them has done is
not done again when another one fails, or when a worker dies.
"""

import csv
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path

from worker import StepFailed, call, gather, map, progress, step, workflow

PORTION = 100


@dataclass
class Customer:
    name: str
    email: str
    balance: Decimal


@dataclass
class Summary:
    sent: int = 0
    total: Decimal = Decimal(0)
    problems: list[str] = field(default_factory=list)


def deliver(to: str, text: str) -> None:
    """Stands for your mail provider's client."""
    print(f"mail to {to}: {text}")


@step
def read_rows(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@step
def check(row: dict[str, str]) -> Customer:
    if "@" not in row["email"]:
        raise ValueError(f"{row['email']!r} is no address")
    try:
        return Customer(row["name"], row["email"], Decimal(row["balance"]))
    except InvalidOperation:
        raise ValueError(f"{row['balance']!r} is no amount") from None


@step
async def send_statement(customer: Customer) -> None:
    deliver(customer.email, f"Dear {customer.name}, your balance is {customer.balance}")


@workflow
async def send_statements(path: str) -> Summary:
    rows = read_rows(path)
    customers, summary = list[Customer](), Summary()
    for begin in range(0, len(rows), PORTION):
        portion = rows[begin : begin + PORTION]
        checked = await gather(*(call(check, row) for row in portion), return_errors=True)
        for line, found in enumerate(checked, start=begin + 2):  # the first line has the names of the columns
            if isinstance(found, Customer):
                customers.append(found)
            else:
                reason = found.message if isinstance(found, StepFailed) else str(found)
                summary.problems.append(f"line {line}: {reason}")
        progress(begin + len(portion), len(rows))
    await map(send_statement, customers, limit=5)  # no more at a time: the provider would refuse them
    summary.sent = len(customers)
    summary.total = sum((customer.balance for customer in customers), Decimal(0))
    return summary
