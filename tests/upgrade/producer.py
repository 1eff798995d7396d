"""A service that enqueues by Python, whichever release it has: `python -P -m tests.upgrade.producer NAME`.

Prints where its `outbox` is, then the id of each run, flushed; ends when its standard input does, with a status other
than 0 if anything went wrong.
"""

# ruff: noqa: T201 - a script that prints

from __future__ import annotations

import itertools
import os
import select
import sys

import psycopg

import outbox
from outbox import Client

EVERY_SECONDS = 0.05
WORKFLOWS = ("short", "plain", "sleepy", "parent", "stumbling")


def main(name: str) -> None:
    print(outbox.__file__, flush=True)
    with Client() as client, psycopg.connect(os.environ["STEPWELL_DATABASE_URL"]) as connection:
        for n in itertools.count():
            if select.select([sys.stdin], [], [], EVERY_SECONDS)[0]:
                return
            workflow = WORKFLOWS[n % len(WORKFLOWS)]
            if n % 3:
                runs = [client.enqueue(workflow, n=n, key=f"{name}-{n}")]
            else:  # in its own transaction
                runs = [client.enqueue(workflow, n=n, key=f"{name}-{n}", tx=connection)]
                connection.commit()
            if n % 20 == 10:
                inputs = [{"n": each} for each in range(5)]
                runs += client.enqueue_many("short", inputs, key=lambda each, n=n: f"{name}-{n}-{each['n']}")
            for run in runs:
                print(run.id, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
