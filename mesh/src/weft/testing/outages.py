"""Servers that stand still, die and come back: what tests of connections do to them."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

from weft.core.broker import Broker
from weft.testing.broker import BrokerMesh
from weft_protocols import ids, subjects

SLACK: Final = 2.0
"""Seconds a busy machine may add to a deadline."""
Connect = Callable[[BrokerMesh, str], Awaitable[Broker]]


def stop(pid: int) -> None:
    """Have the server stand still; it does when this returns."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)


@contextmanager
def stalled(mesh: BrokerMesh) -> Iterator[None]:
    """The server stands still, its connections open."""
    pid = mesh.server.pid
    stop(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def kill(mesh: BrokerMesh) -> None:
    """The server is gone."""
    os.kill(mesh.server.pid, signal.SIGKILL)
    await mesh.server.wait()


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """What is inside ends in that time, or in `SLACK` more."""
    begun = time.monotonic()
    async with asyncio.timeout(seconds + SLACK):
        yield
    assert time.monotonic() - begun <= seconds + SLACK  # noqa: S101 - a test's


def event_subject(unique: Callable[[str], str]) -> str:
    """A subject of the stream that nothing else uses."""
    return subjects.event(unique("agent"), ids.digest(unique("t").encode())[:32], "local", "o")


def others() -> set[asyncio.Task[Any]]:
    """Every task but this one."""
    return asyncio.all_tasks() - {asyncio.current_task()}


async def works(broker: Broker) -> None:
    """A connection is of use. Raises AssertionError, or why it is not."""
    assert (await broker.api("INFO"))["type"] == "io.nats.jetstream.api.v1.account_info_response"  # noqa: S101
