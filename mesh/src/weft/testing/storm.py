"""Faults for a running mesh: processes are killed, frozen or away, the broker is killed, in an order from a seed.

Only processes that were started here are ever signalled.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from weft.testing.broker import BrokerMesh

Kind = Callable[[asyncio.TaskGroup], Awaitable[None]]
"""A fault: returns once it happened; what ends it later goes into the group."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What one process of a storm runs."""

    arguments: tuple[str, ...]
    """After the interpreter."""
    identity: str
    env: Mapping[str, str] = field(default_factory=dict)


class Processes:
    """Processes by name, each with its output in `{name}.log`.

    Args:
        mesh: Where they work.
        folder: For their output.
        units: What each of them runs.
    """

    def __init__(self, mesh: BrokerMesh, folder: Path, units: Mapping[str, Unit]) -> None:
        self.exits: list[str] = []
        """Processes that ended although nobody killed them."""
        self.units = dict(units)
        self._mesh = mesh
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._theirs, self._ours = os.pipe()
        """They leave when the other end closes, however this process ends."""

    def start(self, name: str) -> None:
        """Start the process of that name, or start it again."""
        unit = self.units[name]
        environment = {
            **os.environ,
            "WEFT_HOME": str(self._mesh.home),
            "WEFT_IDENTITY": unit.identity,
            "WEFT_PARENT_FD": str(self._theirs),
            **unit.env,
        }
        with (self._folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, *unit.arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(self._theirs,),
            )

    def bring(self, name: str) -> None:
        """Start a process unless it runs."""
        if name not in self._running:
            self.start(name)

    def revive(self) -> None:
        """Start again what ended by itself, as a supervisor would."""
        for name, process in list(self._running.items()):
            if process.poll() is not None:
                self.exits.append(f"{name} ended with code {process.returncode}")
                self.start(name)

    def kill(self, name: str) -> None:
        """SIGKILL, also while it is frozen, and reap."""
        process = self._running.pop(name, None)
        if process is not None:
            process.kill()
            process.wait()

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to the process of that name, if it runs."""
        process = self._running.get(name)
        if process is not None and process.poll() is None:
            process.send_signal(number)

    def named(self, pid: int) -> str:
        """Name of the process that has an id now; empty where none has."""
        return next((name for name, process in self._running.items() if process.pid == pid), "")

    @contextmanager
    def ended(self) -> Iterator[None]:
        """Kill what is left on the way out."""
        try:
            yield
        finally:
            for name in list(self._running):
                self.kill(name)
            os.close(self._theirs)
            os.close(self._ours)


@dataclass(slots=True)
class Storm:
    """Faults, one after the other, until it is told to stop.

    They come in shuffled rounds: in each one every kind comes as often as its weight says, so that none is left out.

    Args:
        calm: Seconds between two faults, at least and at most.
        kinds: How often each comes in a round.
    """

    mesh: BrokerMesh
    processes: Processes
    dice: random.Random
    calm: tuple[float, float]
    kinds: Mapping[Kind, int] = field(default_factory=dict)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    faults: Counter[str] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)
    """What happened when, in seconds from the first fault's time."""
    _began: float = 0.0
    _round: list[Kind] = field(default_factory=list)

    async def rage(self) -> None:
        """Break something, wait, break something else; leave everything running in the end."""
        self._began = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            while not await self.passed(self.dice.uniform(*self.calm)):
                self.processes.revive()
                await self._next()(group)

    def _next(self) -> Kind:
        if not self._round:
            self._round = [kind for kind, weight in self.kinds.items() for _ in range(weight)]
            self.dice.shuffle(self._round)
        return self._round.pop()

    def note(self, kind: str, what: str) -> None:
        """Count a fault and keep what it was."""
        self.faults[kind] += 1
        self.log.append(f"{asyncio.get_running_loop().time() - self._began:6.2f} {what}")

    async def passed(self, seconds: float) -> bool:
        """Whether the storm was ended within `seconds`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.over.wait()
        return self.over.is_set()

    def kill(self, name: str) -> None:
        """A process ends without another instruction, and is started again."""
        self.processes.kill(name)
        self.processes.start(name)

    def freeze(self, name: str, seconds: float, group: asyncio.TaskGroup) -> None:
        """A process stands still for a while; the zombie then tries to go on."""
        self.processes.signal(name, signal.SIGSTOP)
        group.create_task(self._thaw(name, seconds))

    async def _thaw(self, name: str, seconds: float) -> None:
        await self.passed(seconds)
        self.processes.signal(name, signal.SIGCONT)

    def remove(self, name: str, seconds: float, group: asyncio.TaskGroup) -> None:
        """A process is killed and stays away for a while."""
        self.processes.kill(name)
        group.create_task(self._bring(name, seconds))

    async def _bring(self, name: str, seconds: float) -> None:
        await self.passed(seconds)
        self.processes.bring(name)

    async def kill_broker(self, group: asyncio.TaskGroup) -> None:
        """SIGKILL to the broker; it starts again on the same store and port."""
        self.note("kill_broker", "kill the broker")
        os.kill(self.mesh.server.pid, signal.SIGKILL)
        await self.mesh.server.wait()
        await self.mesh.server.start()


__all__ = ["Kind", "Processes", "Storm", "Unit"]
