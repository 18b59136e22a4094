"""Shared by every test: the async backend, and real brokers.

`mesh` is one broker for a whole module: take unused names from `unique`, add them, and leave the server
alone. One for all modules would cost more than it saves: to declare an agent takes the longer the more there are.
`fresh_mesh` is a broker of the test's own, to be killed, filled or reconfigured.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

import pytest

from weft.core.broker import Broker
from weft.testing.broker import BrokerMesh, start_test_mesh, unique_name

# A shell starts background jobs with SIGINT ignored, and processes started here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_mesh_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own WEFT_* variables must not decide what a test connects to."""
    for name in [name for name in os.environ if name.startswith("WEFT_") and name != "WEFT_NATS_SERVER"]:
        monkeypatch.delenv(name)


class Turns:
    """What another task gets while the block runs.

    Counted in its turns and in the work of this thread rather than by the clock, which a busy machine holds up too.
    """

    def __init__(self) -> None:
        self.count = 0
        self.took = 0.0
        """Seconds."""
        self.work = 0.0
        """Seconds of processor time that this thread used between two turns, at most."""

    async def __aenter__(self) -> Self:
        self._begun, self._used = time.monotonic(), time.thread_time()
        self._task = asyncio.create_task(self._take())
        await asyncio.sleep(0)  # it begins to wait
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.took = time.monotonic() - self._begun
        self.work = max(self.work, time.thread_time() - self._used)
        self._task.cancel()

    async def _take(self) -> None:
        while True:
            await asyncio.sleep(0.01)
            used, self._used = self._used, time.thread_time()
            self.work = max(self.work, self._used - used)
            self.count += 1


@pytest.fixture
def turns() -> Turns:
    """See `Turns`."""
    return Turns()


@pytest.fixture
def unique() -> Callable[[str], str]:
    """Makes names that no other test uses."""
    return unique_name


@pytest.fixture(scope="module")
async def mesh(anyio_backend: str) -> AsyncIterator[BrokerMesh]:
    """The module's broker, with caller `local`."""
    running = await start_test_mesh()
    yield running
    await running.aclose()


@pytest.fixture
async def operator(mesh: BrokerMesh) -> AsyncIterator[Broker]:
    """The operator's connection to it."""
    broker = await mesh.connect("operator")
    yield broker
    await broker.close()


@pytest.fixture
async def fresh_mesh(anyio_backend: str) -> AsyncIterator[BrokerMesh]:
    """A broker of this test's own, with caller `local`."""
    running = await start_test_mesh()
    yield running
    await running.aclose()
