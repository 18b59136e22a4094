"""Agents at work in tests: replicas in this process, or real processes that can be killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar, overload

from weft.client.mesh import Mesh
from weft.core.broker import Broker
from weft.core.supervise import Tasks
from weft.host.agent import Agent
from weft.host.replica import Replica
from weft.testing.broker import BrokerMesh, start_test_mesh
from weft_protocols.errors import BrokerError, Unavailable
from weft_protocols.resources import DURABILITY

T = TypeVar("T")
START_TIMEOUT: Final = 25.0
"""Seconds a process has for its imports and its connection, on a busy machine."""
GRACE: Final = 10.0
"""Seconds a replica has to finish what it runs when a test is over."""
_POLL: Final = 0.01
_TAIL: Final = 500


@overload
async def eventually(check: Callable[[], Awaitable[T]], *, timeout: float = 15.0) -> T: ...
@overload
async def eventually(check: Callable[[], T], *, timeout: float = 15.0) -> T: ...
async def eventually(check: Callable[[], Any], *, timeout: float = 15.0) -> Any:
    """What `check` returns, once that counts as true; for what tells nobody when it changes.

    Raises:
        TimeoutError: it did not within `timeout` seconds.
    """
    async with asyncio.timeout(timeout):
        while True:
            found = check()
            if isinstance(found, Awaitable):
                found = await found
            if found:
                return found
            await asyncio.sleep(_POLL)


class LocalReplica:
    """One replica in this process, on a connection of its own. `running` starts them."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self._tasks = Tasks(f"test of replica {replica.id}")
        self._served: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, mesh: BrokerMesh, agent: Agent, *, grace: float = GRACE) -> Self:
        """Connect as the agent, which the mesh must know; returns when work is being pulled."""
        broker = await mesh.connect(agent.name)
        made = cls(Replica(agent, broker, durability=DURABILITY[mesh.durability]))
        ready = asyncio.Event()
        made._served = made._tasks.start(made._serve(grace, ready))
        await ready.wait()
        return made

    @property
    def id(self) -> str:
        """Id of the replica, as claims and events name it."""
        return self.replica.id

    @property
    def owned(self) -> list[str]:
        """Ids of the tasks it holds in memory now."""
        return list(self.replica.live)

    async def stop(self) -> None:
        """Take no more work, finish what runs within the grace, hand the rest back, and leave. Idempotent."""
        self.replica.stop()
        if self._served is not None:
            await asyncio.wait((self._served,))
        await self.replica.broker.close()

    async def crash(self) -> None:
        """Lose the connection for good: nothing is finished, nothing is handed back."""
        await self.replica.broker.close()
        if self._served is not None:
            await asyncio.wait((self._served,))

    async def _serve(self, grace: float, ready: asyncio.Event) -> None:
        try:
            await self.replica.run(grace=grace, ready=ready.set)
        except BrokerError:
            if not self.replica.broker.closed.is_set():
                raise
        finally:
            ready.set()


@asynccontextmanager
async def running(
    mesh: BrokerMesh, *agents: Agent, replicas: int = 1, grace: float = GRACE
) -> AsyncIterator[list[LocalReplica]]:
    """Replicas of each agent in this process, on a mesh that is declared what it does not know yet.

    Yields them in the order of the agents. At the end they drain within `grace` seconds.
    """
    unknown = [agent.name for agent in agents if agent.name not in mesh.server.accounts.agents]
    if unknown:
        await mesh.add_agent(*unknown)
    async with AsyncExitStack() as stack:
        started = []
        for agent in agents:
            for _ in range(replicas):
                replica = await LocalReplica.start(mesh, agent, grace=grace)
                stack.push_async_callback(replica.stop)
                started.append(replica)
        yield started


@asynccontextmanager
async def client(mesh: BrokerMesh, identity: str = "local") -> AsyncIterator[Mesh]:
    """A caller's connection to a test mesh, as `weft.connect` gives one."""
    broker: Broker = await mesh.connect(identity)
    try:
        made = await Mesh(broker).start()
        try:
            yield made
        finally:
            await made.aclose()
    finally:
        await broker.close()


@asynccontextmanager
async def mesh_for(
    *agents: Agent, replicas: int = 1, coordinator: bool = False, mesh: BrokerMesh | None = None
) -> AsyncIterator[Mesh]:
    """A client of a mesh on which these agents run: a real broker, the agents in this process.

    Args:
        agents: What to run.
        replicas: How many of each.
        coordinator: Also start a coordinator, which `get`, `list`, and following a task by its id need.
        mesh: A running broker to use, such as one shared by a whole test session; a new one if None, which takes
            a third of a second.
    """
    async with AsyncExitStack() as stack:
        if mesh is None:
            mesh = await stack.enter_async_context(await start_test_mesh(agent.name for agent in agents))
        if coordinator:
            await stack.enter_async_context(coordinator_process(mesh))
        await stack.enter_async_context(running(mesh, *agents, replicas=replicas))
        yield await stack.enter_async_context(client(mesh))


class Process:
    """A Python process of a test: started, waited for, killed, stopped and continued, never left behind.

    Args:
        arguments: What to run, after the interpreter.
        ready: Beginning of the line on standard error that says it is ready.
        env: Environment besides the test's own; nothing of `WEFT_*` is inherited.
    """

    def __init__(self, arguments: Sequence[str], *, ready: str, env: Mapping[str, str]) -> None:
        self._arguments = tuple(arguments)
        self._mark = ready
        self._env = {**{k: v for k, v in os.environ.items() if not k.startswith("WEFT_")}, **env}
        self._tasks = Tasks("output of a test's process")
        self._process: asyncio.subprocess.Process | None = None
        self._parent_end = -1
        self._ready = asyncio.Event()
        self.ready_line = ""
        """The line that said it was ready."""
        self.output: deque[str] = deque(maxlen=_TAIL)
        """The last lines it wrote."""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._running().pid

    @property
    def exit_code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._running().returncode

    async def start(self, *, timeout: float = START_TIMEOUT) -> Self:
        """Start it and return when it is ready.

        Raises:
            Unavailable: it ended, or was not ready within `timeout` seconds; with the end of its output.
        """
        theirs, self._parent_end = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *self._arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env={**self._env, "WEFT_PARENT_FD": str(theirs)},
                pass_fds=(theirs,),
                limit=2**20,
            )
        finally:
            os.close(theirs)
        self._tasks.start(self._read(self._process))
        try:
            async with asyncio.timeout(timeout):
                await self._ready.wait()
        except TimeoutError:
            await self.aclose()
            raise Unavailable(f"{self} was not ready within {timeout:g} s: {self.tail()}") from None
        if not self.ready_line:
            raise Unavailable(f"{self} ended with {await self.exited()}: {self.tail()}")
        return self

    def kill(self) -> None:
        """SIGKILL: it ends without another instruction."""
        self._signal(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP: it stands still until `proceed`, its connection open."""
        self._signal(signal.SIGSTOP)

    def proceed(self) -> None:
        """SIGCONT after `pause`."""
        self._signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM: it is asked to drain."""
        self._signal(signal.SIGTERM)

    def orphan(self) -> None:
        """Close this end of its `WEFT_PARENT_FD`, as the end of this process would."""
        if self._parent_end >= 0:
            os.close(self._parent_end)
            self._parent_end = -1

    async def exited(self, *, timeout: float = 20.0) -> int:
        """Its exit code, negative for a signal. Raises TimeoutError when it does not end in `timeout` seconds."""
        async with asyncio.timeout(timeout):
            return await self._running().wait()

    async def said(self, text: str, *, timeout: float = 15.0) -> str:
        """The first line of its output that contains a text, once it was written."""
        return (
            await eventually(lambda: next((line for line in self.output if text in line), None), timeout=timeout) or ""
        )

    def tail(self, lines: int = 25) -> str:
        """The end of its output."""
        return "\n".join(list(self.output)[-lines:])

    async def aclose(self) -> None:
        """Kill it if it still runs, and wait for its end."""
        if self._process is not None and self._process.returncode is None:
            self.kill()
            await self._process.wait()
        self.orphan()
        await self._tasks.idle()

    async def __aenter__(self) -> Self:
        return self if self._process is not None else await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __str__(self) -> str:
        return f"process {' '.join(self._arguments)}"

    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise Unavailable(f"{self} was not started")
        return self._process

    def _signal(self, number: signal.Signals) -> None:
        process = self._running()
        if process.returncode is None:
            process.send_signal(number)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None  # noqa: S101 - it was asked for
        async for line in process.stderr:
            text = line.decode(errors="replace").rstrip()
            self.output.append(text)
            if not self.ready_line and text.startswith(self._mark):
                self.ready_line = text
                self._ready.set()
        self._ready.set()


class ReplicaProcess(Process):
    """One replica as `python -m weft.host TARGET`, with the keys of a test mesh.

    Args:
        mesh: Where it works; the agent must be declared there (`BrokerMesh.add_agent`).
        target: `path/to/file.py:name`.
        identity: The agent's name, which is its account.
        env: Further environment for it, such as `WEFT_GRACE`.
    """

    def __init__(
        self, mesh: BrokerMesh, target: str | Path, *, identity: str, env: Mapping[str, str] | None = None
    ) -> None:
        settings = {
            "WEFT_HOME": str(mesh.home),
            "WEFT_IDENTITY": identity,
            "WEFT_DURABILITY": mesh.durability,
        }
        super().__init__(("-m", "weft.host", str(target)), ready="ready:", env={**settings, **(env or {})})

    @property
    def id(self) -> str:
        """Id of the replica, as claims and events name it."""
        return self.ready_line.rpartition(" ")[2]


class ReplicaProcesses:
    """Replicas of one agent as processes, started one by one and ended together.

    Args:
        mesh: Where they work.
        target: `path/to/file.py:name`.
        identity: The agent's name, which is its account.
        env: Further environment for each.
    """

    def __init__(
        self, mesh: BrokerMesh, target: str | Path, *, identity: str, env: Mapping[str, str] | None = None
    ) -> None:
        self.agent = identity
        self._mesh = mesh
        self._target = target
        self._env = dict(env or {})
        self._started: list[ReplicaProcess] = []

    async def start(self, **env: str) -> ReplicaProcess:
        """One more replica, once it works."""
        process = ReplicaProcess(self._mesh, self._target, identity=self.agent, env={**self._env, **env})
        self._started.append(process)
        return await process.start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._started:
            await process.aclose()


def coordinator_process(mesh: BrokerMesh, *, env: Mapping[str, str] | None = None) -> Process:
    """A coordinator for a test mesh, to be entered with `async with`."""
    settings = {"WEFT_HOME": str(mesh.home), "WEFT_IDENTITY": "coordinator"}
    return Process(("-m", "weft_coordinator.service"), ready="ready", env={**settings, **(env or {})})


def sidecar_process(mesh: BrokerMesh, *, env: Mapping[str, str] | None = None) -> Process:
    """A sidecar for a test mesh, to be entered with `async with`. It needs the extra `sidecar`."""
    settings = {"WEFT_HOME": str(mesh.home), "WEFT_IDENTITY": "sidecar"}
    return Process(("-m", "weft.sidecar"), ready="ready", env={**settings, **(env or {})})


__all__ = [
    "LocalReplica",
    "Process",
    "ReplicaProcess",
    "ReplicaProcesses",
    "client",
    "coordinator_process",
    "eventually",
    "mesh_for",
    "running",
    "sidecar_process",
]
