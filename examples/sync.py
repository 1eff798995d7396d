"""Everything in plain `def`: what an async body awaits goes through `wait`, and into joins by `call`.

    stepwell worker examples/sync.py
    stepwell enqueue quote '{"part": "wheel", "pieces": 4}'
    stepwell signal RUN accepted '"Ada"'

RUN is the id that `enqueue` has printed. Steps in `def` are executed in threads, so they may block as they like.
"""

from dataclasses import dataclass

from worker import call, first, gather, map, sleep, step, wait, wait_signal, workflow

SUPPLIERS = ["north", "south", "east"]
WEEK = 7 * 86400


@dataclass
class Offer:
    supplier: str
    price: int


@dataclass
class Request:
    supplier: str
    part: str
    pieces: int


@step
def ask_supplier(request: Request) -> Offer:
    """Stands for a slow service; what it asks for is made up."""
    return Offer(request.supplier, request.pieces * (10 + len(request.supplier)))


@step
def write_to(who: str, text: str) -> str:
    print(f"mail to {who}: {text}")
    return who


@workflow
def order(part: str, offer: Offer) -> list[str]:
    """Order what was offered: a child run, called as the function that it is."""
    told = wait(
        gather(call(write_to, offer.supplier, f"we order {part}"), call(write_to, "store", f"{part} comes"))
    )
    wait(sleep(WEEK))
    return [*told, write_to("store", f"has {part} come?")]


@workflow
def quote(part: str, pieces: int) -> list[str]:
    requests = [Request(supplier, part, pieces) for supplier in SUPPLIERS]
    offers = wait(map(ask_supplier, requests, limit=2))
    best = min(offers, key=lambda offer: offer.price)
    write_to("sales", f"{best.supplier} offers {part} for {best.price}")
    which, buyer = wait(first(wait_signal("accepted", type=str), sleep(WEEK)))
    if which == 1:
        return []
    write_to(buyer, "thank you")
    return order(part, best)
