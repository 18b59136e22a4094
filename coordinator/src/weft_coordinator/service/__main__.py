"""`python -m weft_coordinator.service`: one coordinator until SIGTERM or SIGINT.

Prints `ready` on standard error when it serves. Exit code 0 when it was told to stop, else that of the error.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

from weft.core.broker import Broker
from weft.core.config import ConnectionSettings, load_settings
from weft_coordinator.service.app import Coordinator
from weft_coordinator.service.settings import Settings
from weft_protocols.errors import WeftError

IDENTITY = "coordinator"


async def serve(connection: ConnectionSettings, settings: Settings) -> None:
    """Connect, serve until a signal, drain."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    _watch_parent(stop)
    broker = await Broker.connect(connection, name="coordinator")
    try:
        coordinator = Coordinator(broker, settings=settings)
        try:
            await coordinator.start()
            print("ready", file=sys.stderr, flush=True)  # noqa: T201 - what its supervisor waits for
            await coordinator.run(stop)
        finally:
            await coordinator.aclose()
    finally:
        await broker.close()


def _watch_parent(stop: asyncio.Event) -> None:
    """Stop when the process that started this one is gone: its end of the pipe `WEFT_PARENT_FD` is then closed."""
    number = os.environ.get("WEFT_PARENT_FD", "")
    if number.isdigit():
        loop, fd = asyncio.get_running_loop(), int(number)

        def gone() -> None:
            loop.remove_reader(fd)
            stop.set()

        loop.add_reader(fd, gone)


def main() -> int:
    """Run; the exit code."""
    logging.basicConfig(
        level=os.environ.get("WEFT_LOG", "INFO").upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        connection = load_settings(os.environ.get("WEFT_IDENTITY") or IDENTITY)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve(connection, Settings.load()))
    except WeftError as error:
        print(f"coordinator: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return error.exit_code
    return 0


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    """uvloop where it installs."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.Loop


if __name__ == "__main__":
    sys.exit(main())
