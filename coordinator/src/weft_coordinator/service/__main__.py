"""`python -m weft_coordinator.service`: one coordinator until SIGTERM or SIGINT.

Prints `ready` on standard error when it serves. Exit code 0 when it was told to stop, else that of the error.
"""

from __future__ import annotations

import asyncio
import os
import sys

from weft.core import process
from weft.core.broker import Broker
from weft.core.config import ConnectionSettings, load_settings
from weft_coordinator.service.app import Coordinator, new_id
from weft_coordinator.service.settings import Settings
from weft_protocols.connections import of_coordinator

IDENTITY = "coordinator"
SWITCH = 0.001
"""Seconds after which a thread that is busy lets another one run: those that read and write the file wait for it."""


async def serve(connection: ConnectionSettings, settings: Settings) -> None:
    """Connect, serve until a signal, drain."""
    stop = asyncio.Event()
    process.leave_when_told(stop.set)
    id = new_id()
    broker = await Broker.connect(connection, name=of_coordinator(id))
    try:
        coordinator = Coordinator(broker, settings=settings, id=id)
        try:
            await coordinator.start()
            process.collect_seldom()
            process.say("ready")
            await coordinator.run(stop)
        finally:
            await coordinator.aclose()
    finally:
        await broker.close()


def main() -> int:
    """Run; the exit code."""
    process.log_to_stderr()
    sys.setswitchinterval(SWITCH)

    async def begin() -> None:
        await serve(load_settings(os.environ.get("WEFT_IDENTITY") or IDENTITY), Settings.load())

    return process.run(IDENTITY, begin)


if __name__ == "__main__":
    sys.exit(main())
