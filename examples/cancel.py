"""Clean up when a run is cancelled, or when its deadline passes: whatever happens, the server is given back.

    stepwell worker examples/cancel.py
    stepwell enqueue simulate '{"rounds": 5}' --deadline 3600
    stepwell runs state RUN
    stepwell runs cancel RUN

A cancelled run ends at once where it waits, and at the end of the step where one is executed. Its body gets `Cancelled`
there, may make calls to clean up, and ends as cancelled whatever it does.
"""

from worker import Cancelled, current_run, progress, set_state, sleep, step, workflow

PAUSE = 600


# The three steps stand for a cloud's service: servers are rented under a name, so renting twice is renting once.
@step
async def rent_server(name: str) -> str:
    print(f"rented {name}")
    return f"10.0.0.1/{name}"


@step
async def simulate_round(server: str, number: int) -> float:
    print(f"round {number} on {server}")
    return 1 / number


@step
async def give_back(server: str) -> None:
    print(f"gave back {server}")


@workflow
async def simulate(rounds: int) -> float:
    total = 0.0
    server = await rent_server(f"simulation-{current_run().id}")
    try:
        for number in range(1, rounds + 1):
            total += await simulate_round(server, number)
            progress(number, rounds)
            await sleep(PAUSE)
    except (Cancelled, Exception):  # no `finally` here: that also runs each time the run is parked
        set_state("cleaning up", True)
        await give_back(server)
        raise
    await give_back(server)
    return total
