"""A supervisor in a process of its own, for tests that kill or stop it: `URL SETTINGS APP PROCESSES [real]`."""

from __future__ import annotations

import asyncio
import json
import logging
import sys

from outbox.settings import Settings
from tests.integration.supervising import SCRIPTED
from worker.supervision.pipe import LOG_FORMAT
from worker.supervision.supervisor import Supervisor


async def main(url: str, settings: str, app: str, processes: str, real: str = "") -> int:
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    supervisor = Supervisor(
        Settings(**json.loads(settings)),
        url,
        app=app,
        processes=int(processes),
        child_command=None if real else SCRIPTED,
    )
    return await supervisor.run()


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*sys.argv[1:])))
