"""The coordinators of one mesh: how many run, and how they are replaced without a moment in which none leads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Final

from weft.cli.supervisor.control import Tell
from weft.cli.supervisor.process import Process
from weft.cli.supervisor.unit import State

COORDINATOR: Final = "coordinator"


def name_of(n: int) -> str:
    """Name of the nth coordinator: the first one is just `coordinator`."""
    return COORDINATOR if n == 1 else f"{COORDINATOR}.{n}"


class Coordinators:
    """Processes by number, from 1.

    Args:
        make: makes the process with a name.
        run: begins to supervise it.
        drain: ends processes in order, and returns when they have ended.
        ready: tells when a process is ready, and returns; raises what is wrong with it.
    """

    def __init__(
        self,
        make: Callable[[str], Process],
        run: Callable[[Process], None],
        *,
        drain: Callable[[Iterable[Process]], Awaitable[None]],
        ready: Callable[[Process, Tell], Awaitable[None]],
    ) -> None:
        self._make = make
        self._run = run
        self._drain = drain
        self._ready = ready
        self._running: list[Process] = []

    @property
    def processes(self) -> list[Process]:
        """All of them, by number."""
        return list(self._running)

    @property
    def names(self) -> list[str]:
        """Their names."""
        return [process.name for process in self._running]

    async def any_ready(self, timeout: float) -> None:
        """Wait for the first one to serve or to fail, at most `timeout` seconds."""
        await self._running[0].reaches(State.READY, State.FAILED, timeout=timeout)

    def begin(self, replicas: int) -> None:
        """Start so many, without waiting for them."""
        for n in range(len(self._running) + 1, replicas + 1):
            process = self._make(name_of(n))
            self._run(process)
            self._running.append(process)

    async def scale(self, replicas: int, tell: Tell) -> None:
        """Start or end some until there are so many."""
        surplus, self._running = self._running[replicas:], self._running[:replicas]
        await self._drain(surplus)
        known = len(self._running)
        self.begin(replicas)
        for process in self._running[known:]:
            await self._ready(process, tell)

    async def restart(self, names: Collection[str], tell: Tell) -> None:
        """Replace the named ones, one after the other, the later ones first."""
        for n in reversed(range(len(self._running))):
            if self._running[n].name not in names:
                continue
            await self._drain([self._running[n]])
            process = self._running[n] = self._make(name_of(n + 1))
            self._run(process)
            await self._ready(process, tell)
