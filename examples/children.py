"""An order and its parcels: a run for each parcel, all at once; one that fails does not take the others with it.

    stepwell worker examples/children.py
    stepwell enqueue fulfil_order '{"order": {"id": 1, "email": "ada@example.com", "items": ["tea", "piano"]}}'
    stepwell runs show RUN
    stepwell runs list --workflow ship_parcel

A child is a run of its own: it has its own history, can be looked at, retried and cancelled on its own, and is cancelled
with its parent. A detached one is not, and nobody waits for it.
"""

from dataclasses import dataclass

from outbox import RunFailed
from worker import Permanent, current_run, sleep, start, step, workflow

DAY = 86400


@dataclass
class Order:
    id: int
    email: str
    items: list[str]


@dataclass
class Fulfilment:
    tracking: dict[str, str]
    refunded: list[str]


@step
async def pack(item: str) -> float:
    if item == "piano":
        raise Permanent("no box is large enough for a piano")
    return 1.5


@step
async def hand_over(item: str, weight: float) -> str:
    """Stands for the service of a carrier."""
    print(f"carrier: {item}, {weight} kg")
    return f"TRACK-{current_run().id}"


@step
async def refund(order: Order, item: str) -> None:
    print(f"refund to {order.email}: {item}")


@step
async def ask_for_review(email: str) -> None:
    print(f"mail to {email}: how was it?")


@workflow
async def ship_parcel(item: str) -> str:
    weight = await pack(item)
    return await hand_over(item, weight)


@workflow
async def review_later(email: str) -> None:
    await sleep(7 * DAY)
    await ask_for_review(email)


@workflow
async def fulfil_order(order: Order) -> Fulfilment:
    parcels = {item: start(ship_parcel, item, deadline=DAY) for item in order.items}
    done = Fulfilment({}, [])
    for item, parcel in parcels.items():
        try:
            done.tracking[item] = await parcel
        except RunFailed:
            await refund(order, item)
            done.refunded.append(item)
    if done.tracking:
        start(review_later, order.email, detached=True)  # lives on when this run has ended
    return done
