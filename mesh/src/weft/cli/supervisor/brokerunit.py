"""The embedded broker as a supervised process."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from weft.cli.supervisor.policy import Ended, History, describe
from weft.cli.supervisor.unit import State, Unit
from weft.core.serverproc import send_signal
from weft_protocols.errors import UsageError, WeftError

if TYPE_CHECKING:
    from weft.cli.supervisor.process import Surroundings
    from weft.core.server import EmbeddedServer

LEFTOVER: Final = 10.0
"""Seconds the broker of a supervisor that was killed may take to end."""


class BrokerUnit(Unit):
    """Starts the server, sees it end, starts it again on the same port and store.

    Args:
        server: the broker of this home directory, not started.
        around: the supervisor's part.
        prepare: awaited whenever the server answers, before anybody is told that it is ready.
    """

    def __init__(self, server: EmbeddedServer, around: Surroundings, *, prepare: Callable[[], Awaitable[None]]) -> None:
        super().__init__("broker", "broker", around.on_change)
        self.server = server
        self._around = around
        self._prepare = prepare
        self._history = History(around.policy)
        self._stop = asyncio.Event()
        self._wake = asyncio.Event()

    async def begin(self) -> None:
        """The first start. Raises what is wrong, since nothing can run without a broker."""
        deadline = time.monotonic() + LEFTOVER
        while True:
            try:
                await self._start()
                return
            except UsageError as error:
                # A broker whose supervisor was killed ends on its own, a little later.
                if type(error) is not UsageError or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)

    async def run(self) -> None:
        """Keep it running until `stop`, after `begin`."""
        while not self._stop.is_set():
            began, ready = time.monotonic(), self.state is State.READY
            code = (await self.server.wait()) if ready else 1
            self._gone()
            if self._stop.is_set():
                break
            ran = time.monotonic() - began
            await self._after(Ended(code if code is not None else 1, ran, ran if ready else None))
            if self._stop.is_set():
                break
            try:
                await self._start()
            except (WeftError, OSError) as error:
                await self.server.stop()
                self.reason = str(error)
        await self.server.stop()
        self._gone()
        self.become(State.STOPPED)

    async def stop(self) -> None:
        """Stop the server; `run` returns."""
        self._stop.set()
        self._wake.set()
        if self.state is State.READY:
            self.become(State.DRAINING)
            await self.server.stop()

    def bounce(self) -> None:
        """Have the server end, and started again at once."""
        self._history.forget()
        self._wake.set()
        if self.state is State.READY:
            self.become(State.DRAINING)
            send_signal(self.server.pid, signal.SIGTERM)

    async def _start(self) -> None:
        self.started = time.time()
        self.become(State.STARTING)
        await self.server.start()
        self.pid = self.server.pid
        self._around.groups.add(self.pid, signal.SIGTERM)
        await self._prepare()
        self.reason = ""
        self.become(State.READY)

    def _gone(self) -> None:
        if self.pid is not None:
            self._around.groups.remove(self.pid)
            self.pid = None

    async def _after(self, ended: Ended) -> None:
        """Pause before the next start; without a broker there is no giving up, only the longest pause."""
        if ended.ready is not None:
            self.reason = describe(ended)
        pause = self._history.next_pause(ended, now=time.monotonic(), chance=random.random())
        if pause is None:
            pause = self._around.policy.longest
        self.become(State.BACKOFF)
        try:
            async with asyncio.timeout(pause):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()
        self.restarts += 1
