"""A supervisor in a process of its own, for tests that kill or stop it: `URL SETTINGS APP PROCESSES [real]`."""

from __future__ import annotations

import asyncio
import json
import logging
import sys

from outbox.settings import Settings
from tests.integration.supervising import SCRIPTED
from worker.supervision.supervisor import Supervisor
from worker.telemetry.logs import set_up_logs


async def main(url: str, settings: str, app: str, processes: str, real: str = "") -> int:
    set_up_logs(logging.INFO)
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
