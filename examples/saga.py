"""Book a trip, or nothing of it: when a later booking fails, the earlier ones are undone, the last one first.

    stepwell worker examples/saga.py
    stepwell enqueue create_hotel --wait
    stepwell enqueue book_trip '{"trip": {"id": 1, "traveller": "Ada", "city": "Oslo"}}' --wait
    stepwell enqueue book_trip '{"trip": {"id": 2, "traveller": "Ada", "city": "Venice"}}' --wait

In Venice there are no cars: the room is released, and the flight is cancelled and refunded. The same happens when a
run is cancelled. Undoing is made of steps, so it is recorded, tried again, and survives crashes as everything else.
"""

from dataclasses import dataclass

import psycopg
from tenacity import stop_after_attempt

from worker import Permanent, current_step, retrying, step, transaction, workflow

PRICE = 120
PATIENT = retrying(stop=stop_after_attempt(10), on=ConnectionError)


@dataclass
class Trip:
    id: int
    traveller: str
    city: str


def request(service: str, what: str, key: str) -> str:
    """Stands for the services of airlines and the like, which know a request again by its idempotency key."""
    print(f"{service}: {what}")
    return f"{service}-{key}"


# An undo is called with the arguments of its step by their names, and with its result in one more parameter.
@step(retry=PATIENT)
async def refund_flight(trip: Trip, ticket: str) -> None:
    request("airline", f"refund {PRICE} to {trip.traveller} for trip {trip.id}", ticket)


@step(retry=PATIENT, undo=refund_flight)
async def book_flight(trip: Trip) -> str:
    return request("airline", f"book a flight to {trip.city}", current_step().idempotency_key)


@transaction
def release_room(connection: psycopg.Connection, trip: Trip) -> None:
    connection.execute("delete from hotel_rooms where trip = %s", [trip.id])


@transaction(undo=release_room)  # both are exactly once: the hotel is in our own database
def reserve_room(connection: psycopg.Connection, trip: Trip) -> None:
    connection.execute("insert into hotel_rooms (trip, city) values (%s, %s)", [trip.id, trip.city])


@step(retry=PATIENT)
async def rent_car(trip: Trip) -> str:
    if trip.city == "Venice":
        raise Permanent("there are no cars in Venice")
    return request("cars", f"rent a car in {trip.city}", current_step().idempotency_key)


@workflow
async def book_trip(trip: Trip) -> list[str]:
    ticket = await book_flight(trip)
    reserve_room(trip)
    car = await rent_car(trip)
    return [ticket, car]


@transaction
def create_hotel_tables(connection: psycopg.Connection) -> None:
    connection.execute("create table if not exists hotel_rooms (trip int primary key, city text)")


@workflow
async def create_hotel() -> None:
    """Make the table of this example; in a project of your own a migration does that."""
    create_hotel_tables()
