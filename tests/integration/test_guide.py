"""The examples of the guide about runs that do several things, done on a real database as they stand there."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import worker
from outbox import Client, RunCancelled
from tests.engines import Lab
from tests.waiting import wait_until_async
from worker.definitions import Registry, collecting

GUIDE = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
SECTIONS = (
    "Several things at once",
    "Signals, state and streams",
    "Children",
    "Cancelling and undo",
    "Long runs",
)


@dataclass
class Order:
    id: int
    items: list[str] = field(default_factory=lambda: ["pen", "ink"])


@dataclass
class Approval:
    by: str


class Shop:
    """The definitions of the guide, around the steps that it takes for granted."""

    def __init__(self) -> None:
        self.done: list[str] = []
        names: dict[str, Any] = {name: getattr(worker, name) for name in worker.__all__}
        names |= {"Order": Order, "Approval": Approval, "Client": Client, "__name__": __name__}
        with collecting() as registry:
            names |= self._steps()
            for title in SECTIONS:
                for block in re.findall(r"^```python\n(.*?)^```", section(title), re.MULTILINE | re.DOTALL):
                    exec(compile(_with_bodies(block), title, "exec"), names)
        self.registry: Registry = registry
        self.names = names

    def __getattr__(self, name: str) -> Any:
        return self.names[name]

    def _steps(self) -> dict[str, Any]:
        done = self.done

        @worker.step
        async def write_invoice(order: Order) -> str:
            return f"invoice {order.id}"

        @worker.step
        def print_label(order: Order) -> str:
            return f"label {order.id}"

        @worker.step
        def pack(item: str) -> None:
            done.append(f"pack {item}")

        @worker.step
        async def ship(item: str) -> str:
            return f"{item} is on its way"

        @worker.step
        async def tell_customer(order: Order) -> None:
            done.append("tell")

        @worker.step
        async def bill(customer: int, month: int) -> None:
            done.append(f"bill {month}")

        @worker.workflow
        async def summarise(count: int) -> str:
            return f"{count} orders"

        def note(order: Order) -> str:
            done.append("note")
            return "noted"

        steps = (write_invoice, print_label, pack, ship, tell_customer, bill, summarise)
        return {each.name: each for each in steps} | {"note": note}


def _with_bodies(block: str) -> str:
    """Return an example in which functions that do something unsaid note that they were called."""
    block = block.replace("-> str: ...", "-> str:\n    return note(order)\n")
    return block.replace("-> None: ...", "-> None:\n    note(order)\n")


def section(title: str) -> str:
    """Return the text of a section."""
    return GUIDE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.fixture
def client(database_url: str) -> Iterator[Client]:
    with Client(database_url) as opened:
        yield opened


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


async def test_the_examples_of_the_guide_do_what_it_says(lab: Lab, client: Client) -> None:
    shop = Shop()

    async def ended(run: Any) -> Any:
        return await asyncio.to_thread(run.result, 20)

    async with lab.engine(shop.registry):
        assert await ended(client.enqueue(shop.fulfil, Order(1))) == ["invoice 1", "label 1"]
        assert sorted(shop.done) == ["pack ink", "pack pen"]

        shipped = await asyncio.to_thread(shop.watch, client, Order(2))
        assert shipped == ["pen is on its way", "ink is on its way"]

        parent = client.enqueue(shop.ship_all, [Order(3), Order(4)], key="k")
        await lab.waits(parent.id)
        (first,) = await asyncio.to_thread(
            lambda: [run for run in client.list("approve") if run.parent == parent.id]
        )
        assert first.key == "ship_all:k:2"
        await asyncio.to_thread(client.signal, first.id, "approved", Approval("Grace"))
        await lab.succeeded(first.id)

        def second() -> Any:
            found = client.list("approve", "waiting")
            return next((run for run in found if run.parent == parent.id), None)

        other = await wait_until_async(lambda: asyncio.to_thread(second), 60)
        await asyncio.to_thread(client.signal, other.id, "approved", Approval("Edsger"))
        assert await ended(parent) == ["Grace", "Edsger", "2 orders"]

        shop.done.clear()
        sold = client.enqueue(shop.sell, Order(5))
        await lab.waits(sold.id)
        await asyncio.to_thread(sold.cancel)
        with pytest.raises(RunCancelled):
            await ended(sold)
        assert shop.done == ["note", "tell", "note"]

        subscribed = client.enqueue(shop.subscription, 7)
        await lab.waits(subscribed.id)
        await lab.execute("update stepwell.tasks set due_at = now() where due_at > now() + interval '1 day'")
        await wait_until_async(lambda: "bill 2" in shop.done, 60)
        await asyncio.to_thread(subscribed.signal, "cancelled")
        assert await ended(subscribed) == "ended after 2 months"
