"""The life of `mesh up`: one at a time per mesh, reachable while it runs, leaving nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from weft.cli.output import rfc3339
from weft.cli.supervisor.control import ControlServer, Tell
from weft.cli.supervisor.fleet import Fleet, Timing
from weft.cli.supervisor.guard import Guard
from weft.cli.supervisor.logfile import LogFile
from weft.cli.supervisor.policy import RestartPolicy
from weft.cli.supervisor.process import Surroundings
from weft.cli.supervisor.state import Lock, Record, config_digest, forget, socket_path
from weft.cli.supervisor.unit import State, Unit
from weft.core.config import CONFIG_NAME, MeshConfig
from weft.core.home import Home, make_private_directory, process_started
from weft_protocols.errors import UsageError, WeftError

if TYPE_CHECKING:
    from pathlib import Path


class Listener(Protocol):
    """Whoever shows what happens."""

    def line(self, name: str, text: str) -> None:
        """A process wrote a line."""

    def changed(self, unit: Unit) -> None:
        """A process changed its state."""

    def say(self, text: str) -> None:
        """A line of the supervisor's own."""

    def up(self, url: str, units: list[Unit]) -> None:
        """Every process is ready or failed, for the first time."""


class Supervisor:
    """One mesh of one project folder.

    Args:
        config: what to run.
        home: the home directory; created if need be.
        listener: is told what happens.
        policy: when ended processes are started again.
        timing: how long anything is waited for.
    """

    def __init__(
        self,
        config: MeshConfig,
        home: Path,
        *,
        listener: Listener,
        policy: RestartPolicy | None = None,
        timing: Timing | None = None,
    ) -> None:
        self._config = config
        self._home = Home(home.absolute())
        self._listener = listener
        self._timing = timing or Timing()
        self._guard = Guard()
        self._logs: dict[str, LogFile] = {}
        self._around = Surroundings(self._guard, policy or RestartPolicy(), listener.line, listener.changed, self._log)
        self._kill: Callable[[], None] = lambda: None
        self._socket = self._home.root
        self._stop = asyncio.Event()
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        """Start everything, keep it running until `stop`, then stop it in order.

        Raises:
            AlreadyRunning: another supervisor runs this mesh.
            WeftError: the broker cannot be started; what fails later is started again instead.
        """
        make_private_directory(self._home.root)
        make_private_directory(self._home.logs)
        lock = Lock(self._home.root)
        lock.acquire()
        try:
            forget(self._home.root)
            self._guard.start()
            async with asyncio.TaskGroup() as group:
                await self._serve(group)
        finally:
            self._guard.close()
            for log in self._logs.values():
                log.close()
            forget(self._home.root)
            lock.release()

    def stop(self) -> None:
        """Drain the agents, then end everything. Asked twice, agents are killed instead of drained."""
        if self._stop.is_set():
            self._kill()
        self._stop.set()

    async def _serve(self, group: asyncio.TaskGroup) -> None:
        fleet = Fleet(
            self._config,
            self._home,
            group=group,
            around=self._around,
            say=self._listener.say,
            timing=self._timing,
        )
        self._kill = fleet.kill_agents

        async def operate(operation: str, arguments: Mapping[str, Any], tell: Tell) -> Any:
            return await self._operate(fleet, operation, arguments=arguments, tell=tell)

        self._socket = socket_path(self._home.root)
        control = ControlServer(self._socket, operate, group=group)
        try:
            await fleet.begin()
            await control.start()
            self._remember()
            watch = group.create_task(self._announce(fleet))
            await self._stop.wait()
            watch.cancel()
            await fleet.drain_all()
            self._stopped.set()
            control.hang_up()
        finally:
            await fleet.abandon()
            await control.close()

    async def _announce(self, fleet: Fleet) -> None:
        for unit in fleet.units:
            await unit.reaches(State.READY, State.FAILED, State.STOPPED, timeout=None)
        try:
            await fleet.apply_policy()
        except WeftError as error:
            self._listener.say(f"which policy decides cannot be seen to: {error}")
        if (gateway := fleet.addresses) is not None:
            self._listener.say(f"agents are at {gateway.http}/agents, by gRPC at {gateway.grpc}")
        self._listener.up(fleet.url, fleet.units)

    async def _operate(self, fleet: Fleet, operation: str, *, arguments: Mapping[str, Any], tell: Tell) -> Any:
        """An operation of the control socket."""
        match operation:
            case "ps":
                return [unit.row() for unit in fleet.units]
            case "stop":
                self.stop()
                await self._stopped.wait()
                return True
            case "restart":
                name = arguments.get("name")
                done = await fleet.restart(name, tell)
                if name is None:
                    self._remember()
                return done
            case "scale":
                name, replicas = arguments.get("name"), arguments.get("replicas")
                if isinstance(name, str) and isinstance(replicas, int):
                    return await fleet.scale(name, replicas, tell)
        raise UsageError(f"this supervisor knows no operation {operation!r} with these arguments")

    def _remember(self) -> None:
        """Write down where this supervisor is, and which `mesh.yaml` it runs."""
        digest = config_digest(self._config.folder / CONFIG_NAME)
        started = process_started(os.getpid()) or ""
        Record(os.getpid(), started, str(self._socket), digest).write(self._home.root)

    def _log(self, name: str) -> LogFile:
        if name not in self._logs:
            self._logs[name] = LogFile(self._home.logs / f"{name}.log", now=lambda: rfc3339(time.time()))
        return self._logs[name]


def watch_signals(call: Callable[[], None]) -> None:
    """Have `call` run at SIGINT, SIGTERM and SIGHUP, in the event loop."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, call)
