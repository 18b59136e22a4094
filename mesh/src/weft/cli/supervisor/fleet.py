"""The processes of one mesh, and what can be done with them: start, restart, scale, drain."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from weft.cli.errors import NotFound
from weft.cli.supervisor import rules
from weft.cli.supervisor.brokerunit import BrokerUnit
from weft.cli.supervisor.control import Tell
from weft.cli.supervisor.coordinators import COORDINATOR, Coordinators
from weft.cli.supervisor.process import Process, ProcessSpec, Surroundings
from weft.cli.supervisor.unit import State, Unit
from weft.core import toolsconf
from weft.core.broker import Broker
from weft.core.config import CONFIG_NAME, AgentConfig, MeshConfig, did_you_mean, load_mesh_config
from weft.core.coordconf import MOST_COORDINATORS
from weft.core.gatewayconf import INSTALL, missing_modules
from weft.core.home import GatewayRecord, Home
from weft.core.server import EmbeddedServer
from weft.core.toolstore import ToolStore
from weft.core.topology import reconcile
from weft_protocols.errors import UsageError, WeftError
from weft_protocols.resources import topology
from weft_protocols.subjects import OPERATOR

GATEWAY: Final = "gateway"
SIDECAR: Final = "sidecar"
COORDINATOR_WITHIN: Final = 20.0
"""Seconds the first agents wait for the coordinator; tasks run without it, so no longer."""
MOST_REPLICAS: Final = 1000
_OUTSIDE: Final = ("WEFT_URL", "WEFT_SEED_FILE", "WEFT_IDENTITY", "WEFT_HOME")
"""Variables that would lead a child to another mesh."""


@dataclass(frozen=True, slots=True)
class Timing:
    """The supervisor's waits, in seconds."""

    ready_within: float = 60.0
    """A process that is not ready by then is killed and started again."""
    kill_after: float = 5.0
    """Beyond an agent's own grace, in which it hands back what it cannot finish."""
    coordinator_grace: float = 10.0
    """Between SIGTERM and SIGKILL of the coordinator."""
    gateway_grace: float = 10.0
    """In which calls and streams under way at the gateway may end, before it ends them."""
    sidecar_grace: float = 10.0
    """In which tool calls under way may end."""
    margin: float = 10.0
    """Beyond a process's grace, until a shutdown goes on without it."""


class Fleet:
    """Broker, coordinator, gateway, sidecar and agents of one `mesh.yaml`.

    Args:
        config: what to run; read again at every restart.
        home: the home directory.
        group: runs the processes; it ends when `drain_all` is done.
        around: what every process needs.
        say: says a line of the fleet's own.
        timing: how long anything is waited for.
    """

    def __init__(
        self,
        config: MeshConfig,
        home: Home,
        *,
        group: asyncio.TaskGroup,
        around: Surroundings,
        say: Callable[[str], None],
        timing: Timing,
    ) -> None:
        self._config = config
        self._home = home
        self._group = group
        self._around = around
        self._say = say
        self._timing = timing
        self._changes = asyncio.Lock()
        self._closing = False
        self._broker = BrokerUnit(self._server(), around, prepare=self._apply_topology)
        self._coordinators = Coordinators(self._make_coordinator, self._run, drain=self._drain, ready=self._until_ready)
        self._gateway: Process | None = None
        self._sidecar: Process | None = None
        self._tools = 0
        """Tool servers that are registered."""
        self._replicas: dict[str, dict[int, Process]] = {}
        self._retiring: list[Process] = []

    async def begin(self) -> None:
        """Start the broker, raising what is wrong with it, and have everything else start when it can."""
        await self._broker.begin()
        self._group.create_task(self._broker.run())
        self._coordinators.begin(self._config.coordinator.replicas)
        self._sidecar = self._begin_sidecar()
        self._gateway = self._begin_gateway()
        for agent in self._config.agents.values():
            self._replicas[agent.name] = {
                n: self._launch(self._replica(agent, n)) for n in range(1, agent.replicas + 1)
            }

    async def abandon(self) -> None:
        """Stop the broker, whatever state it is in; nothing else runs any more."""
        await self._broker.server.stop()

    @property
    def url(self) -> str:
        """Address of the broker."""
        return self._broker.server.url

    @property
    def units(self) -> list[Unit]:
        """Every process, in the order in which they are shown."""
        return [self._broker, *self._coordinators.processes, *self._borders(), *self._agents()]

    @property
    def addresses(self) -> GatewayRecord | None:
        """Where the gateway is, once it serves."""
        if self._gateway is None or self._gateway.state is not State.READY:
            return None
        record = GatewayRecord.read(self._home)
        return record if record is not None and record.pid == self._gateway.pid else None

    def kill_agents(self) -> None:
        """Do not wait for the agents and whoever follows them."""
        for process in (*self._agents(), *self._borders()):
            process.kill()

    async def drain_all(self) -> None:
        """Have the agents finish what they do, then end the coordinator, then the broker.

        The gateway takes nothing new meanwhile, and passes on what the agents finish.
        """
        self._closing = True
        agents = self._agents()
        if any(process.state is State.READY for process in agents):
            self._say("draining the agents")
        await self._drain([*agents, *([self._gateway] if self._gateway is not None else ())])
        await self._drain([*([self._sidecar] if self._sidecar is not None else ())])
        await self._drain(self._coordinators.processes)
        await self._broker.stop()
        await self._broker.reaches(State.STOPPED, timeout=2 * self._timing.margin)

    # Operations --------------------------------------------------------------------------------

    async def restart(self, name: str | None, tell: Tell) -> list[str]:
        """Restart a process, an agent replica by replica, or everything but the broker. Returns the names.

        `mesh.yaml` is read again first: agents that are new in it are started, missing ones are drained.
        """
        async with self._changes:
            fresh = load_mesh_config(self._config.folder / CONFIG_NAME)
            before, self._config = self._config, replace(fresh, broker=self._config.broker)
            if fresh.broker.durability != before.broker.durability or fresh.broker.port not in (
                0,
                before.broker.port,
            ):
                tell("the broker section of mesh.yaml changed: that takes `mesh down` and `mesh up`")
            await self._admit()
            await self._declare_tools(tell)
            if name is not None:
                done = await self._restart_named(name, before, tell)
                if name == SIDECAR:
                    await self.apply_policy(tell)
                return done
            done = await self._restart_coordinator(tell)
            if self._gateway is not None or self._config.gateway.enabled:
                done += await self._restart_gateway(tell)
            if self._sidecar is not None or self._tools:
                done += await self._restart_sidecar(tell)
            await self.apply_policy(tell)
            for agent in sorted(self._replicas.keys() | self._config.agents.keys()):
                done += await self._restart_agent(agent, before, tell)
            return done

    async def scale(self, name: str, replicas: int, tell: Tell) -> list[str]:
        """Start or drain replicas until there are so many. Returns the names that remain."""
        async with self._changes:
            if name == COORDINATOR:
                return await self._scale_coordinator(replicas, tell)
            if name not in self._replicas:
                raise self._unknown(name, self._replicas)
            if not 0 <= replicas <= MOST_REPLICAS:
                raise UsageError(f"{replicas} replicas is out of range: use 0 to {MOST_REPLICAS}")
            config = self._config.agents.get(name)
            if config is None:
                raise UsageError(f"agent {name!r} is no longer in mesh.yaml; run `mesh restart` to drain it")
            await self._set_replicas(config, replicas, tell)
            return [process.name for process in self._replicas[name].values()]

    # Parts -------------------------------------------------------------------------------------

    def _server(self) -> EmbeddedServer:
        wanted = self._config.broker
        return EmbeddedServer(
            self._home.root,
            durability=wanted.durability,
            port=wanted.port,
            agents=tuple(self._config.agents),
            callers=self._config.callers,
            max_bytes=wanted.max_bytes,
            orphan_protection=True,
        )

    async def _apply_topology(self) -> None:
        """Create the streams, and the consumers of every agent that may connect."""
        server, wanted = self._broker.server, self._config.broker
        broker = await Broker.connect(server.settings(COORDINATOR), name="mesh up")
        try:
            wished = topology(tuple(server.accounts.agents), wanted.durability, max_bytes=wanted.max_bytes)
            report = await reconcile(broker, wished, apply=True)
            await self._store_tools(broker)
            await rules.declare_mode(broker, self._config.policy, self._say)
        finally:
            await broker.close()
        for drift in report.drifted:
            self._say(f"the broker differs from this version of weft: {drift}")

    async def _declare_tools(self, tell: Tell) -> None:
        """Have the tool servers of `mesh.yaml` registered as they stand there now, and the policy hold or watch."""
        broker = await Broker.connect(self._broker.server.settings(COORDINATOR), name="mesh tools")
        try:
            await self._store_tools(broker)
            await rules.declare_mode(broker, self._config.policy, tell)
        finally:
            await broker.close()

    async def apply_policy(self, tell: Tell | None = None) -> None:
        """Have the rules of the folder that `mesh.yaml` names decide. What is wrong with them is told."""
        broker = await Broker.connect(self._broker.server.settings(OPERATOR), name="mesh policy")
        try:
            await rules.apply(broker, self._config.policy, tell or self._say)
        finally:
            await broker.close()

    async def _store_tools(self, broker: Broker) -> None:
        store = ToolStore(broker)
        await store.declare(self._config.tools.values())
        self._tools = len(await store.registered())

    async def _admit(self) -> None:
        """Let everybody whom `mesh.yaml` names connect."""
        server = self._broker.server
        agents, callers = set(self._config.agents), set(self._config.callers)
        if agents - server.accounts.agents.keys() or callers - server.accounts.callers.keys():
            await server.declare(agents=agents, callers=callers)
            await self._apply_topology()

    def _make_coordinator(self, name: str) -> Process:
        spec = ProcessSpec(
            name,
            COORDINATOR,
            (sys.executable, "-m", "weft_coordinator.service"),
            self._environment(COORDINATOR, self._config.coordinator.environment),
            self._config.folder,
            ready_within=self._timing.ready_within,
            grace=self._timing.coordinator_grace,
        )
        return Process(spec, self._around, may_start=self._broker_ready)

    def _begin_gateway(self) -> Process | None:
        """Start the gateway, if it is wanted and what it needs is installed."""
        if not self._config.gateway.enabled:
            return None
        if missing := missing_modules():
            self._say(
                f"no gateway: {', '.join(missing)} not installed; {INSTALL} adds HTTP and gRPC, "
                "`gateway: false` in mesh.yaml does without"
            )
            return None
        grace = self._timing.gateway_grace
        spec = ProcessSpec(
            GATEWAY,
            GATEWAY,
            (sys.executable, "-m", "weft.gateway"),
            self._environment(GATEWAY, WEFT_GRACE=f"{grace:g}"),
            self._config.folder,
            ready_within=self._timing.ready_within,
            grace=grace + self._timing.kill_after,
        )
        return self._launch(spec)

    def _begin_sidecar(self) -> Process | None:
        """Start the sidecar, if there are tools and what it needs is installed."""
        if not self._tools:
            return None
        if missing := toolsconf.missing_modules():
            self._say(f"no tools: {', '.join(missing)} not installed; {toolsconf.INSTALL} adds the sidecar")
            return None
        grace = self._timing.sidecar_grace
        spec = ProcessSpec(
            SIDECAR,
            SIDECAR,
            (sys.executable, "-m", "weft.sidecar"),
            self._environment(SIDECAR, WEFT_GRACE=f"{grace:g}"),
            self._config.folder,
            ready_within=self._timing.ready_within,
            grace=grace + self._timing.kill_after,
        )
        return self._launch(spec)

    def _replica(self, agent: AgentConfig, n: int) -> ProcessSpec:
        return ProcessSpec(
            f"{agent.name}.{n}",
            "agent",
            (sys.executable, "-m", "weft.host", *agent.target),
            self._environment(agent.name, agent.env, WEFT_GRACE=f"{agent.grace:g}"),
            self._config.folder,
            agent=agent.name,
            ready_within=self._timing.ready_within,
            grace=agent.grace + self._timing.kill_after,
        )

    def _environment(self, identity: str, extra: Mapping[str, str] | None = None, **more: str) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name not in _OUTSIDE}
        return {
            **inherited,
            "PYTHONUNBUFFERED": "1",
            **(extra or {}),
            "WEFT_HOME": str(self._home.root),
            "WEFT_IDENTITY": identity,
            "WEFT_DURABILITY": self._config.broker.durability,
            **more,
        }

    def _launch(self, spec: ProcessSpec) -> Process:
        first = True

        async def may_start() -> None:
            nonlocal first
            await self._broker_ready()
            if first:
                await self._coordinators.any_ready(COORDINATOR_WITHIN)
            first = False

        process = Process(spec, self._around, may_start=may_start)
        self._run(process)
        return process

    def _run(self, process: Process) -> None:
        """Start to supervise a process; what begins during a shutdown would never be drained."""
        if self._closing:
            raise WeftError("the mesh is stopping")
        self._group.create_task(process.run())

    async def _broker_ready(self) -> None:
        await self._broker.reaches(State.READY, timeout=None)

    def _borders(self) -> list[Process]:
        return [process for process in (self._gateway, self._sidecar) if process is not None]

    def _agents(self) -> list[Process]:
        current = [replicas[n] for replicas in self._replicas.values() for n in sorted(replicas)]
        return [*current, *(process for process in self._retiring if process not in current)]

    # Restarting --------------------------------------------------------------------------------

    async def _restart_named(self, name: str, before: MeshConfig, tell: Tell) -> list[str]:
        if name in self._replicas or name in self._config.agents:
            return await self._restart_agent(name, before, tell)
        if name == COORDINATOR:
            return await self._restart_coordinator(tell)
        if name in self._coordinators.names:
            await self._coordinators.restart([name], tell)
            return [name]
        if name == GATEWAY and (self._gateway is not None or self._config.gateway.enabled):
            return await self._restart_gateway(tell)
        if name == SIDECAR and (self._sidecar is not None or self._tools):
            return await self._restart_sidecar(tell)
        if name == "broker":
            return await self._restart_broker(tell)
        agent, _, number = name.rpartition(".")
        if number.isdigit() and int(number) in self._replicas.get(agent, {}):
            config = self._config.agents.get(agent)
            if config is None:
                raise UsageError(f"agent {agent!r} is no longer in mesh.yaml; run `mesh restart {agent}`")
            await self._roll(config, int(number), tell)
            return [name]
        known = [*self._replicas, *(unit.name for unit in self.units)]
        raise self._unknown(name, known)

    async def _restart_agent(self, name: str, before: MeshConfig, tell: Tell) -> list[str]:
        """One replica after the other, so that the agent serves all the time."""
        config = self._config.agents.get(name)
        if config is None:
            tell(f"{name} is no longer in mesh.yaml: draining it")
            gone = [process.name for process in self._replicas[name].values()]
            await self._drain(self._replicas.pop(name).values())
            return gone
        known = before.agents.get(name)
        running = self._replicas.setdefault(name, {})
        for n in sorted(running):
            await self._roll(config, n, tell)
        if known is None or known.replicas != config.replicas or not running:
            await self._set_replicas(config, config.replicas, tell)
        return [process.name for process in running.values()]

    async def _roll(self, config: AgentConfig, n: int, tell: Tell) -> None:
        """Start the new replica, wait until it is ready, then drain the old one."""
        old = self._replicas[config.name][n]
        if old.state in (State.FAILED, State.BACKOFF):
            old.stop()
            await old.reaches(State.STOPPED, timeout=self._timing.margin)
            new = self._replicas[config.name][n] = self._launch(self._replica(config, n))
            await self._until_ready(new, tell)
            return
        new = self._launch(self._replica(config, n))
        self._replicas[config.name][n] = new
        self._retiring.append(old)
        try:
            await self._until_ready(new, tell)
        except WeftError as error:
            self._replicas[config.name][n] = old
            new.stop(0.0)
            raise WeftError(f"{error}; the old one (pid {old.pid}) goes on") from None
        else:
            await self._drain([old])
            tell(f"{old.name}: the old one is drained")
        finally:
            self._retiring.remove(old)

    async def _until_ready(self, process: Process, tell: Tell) -> None:
        limit = self._timing.ready_within + self._timing.margin
        await process.reaches(State.READY, State.BACKOFF, State.FAILED, State.STOPPED, timeout=limit)
        if process.state is not State.READY:
            why = process.reason or f"it is still {process.state.value}"
            raise WeftError(f"the new {process.name} did not become ready ({why})")
        tell(f"{process.name} is ready (pid {process.pid})")

    async def _restart_coordinator(self, tell: Tell) -> list[str]:
        """One after the other, and as many as `mesh.yaml` says now."""
        wanted = self._config.coordinator.replicas
        before = self._coordinators.names[:wanted]
        await self._coordinators.scale(wanted, tell)
        await self._coordinators.restart(before, tell)
        return self._coordinators.names

    async def _scale_coordinator(self, replicas: int, tell: Tell) -> list[str]:
        if not 1 <= replicas <= MOST_COORDINATORS:
            raise UsageError(f"{replicas} coordinators is out of range: use 1 to {MOST_COORDINATORS}")
        await self._coordinators.scale(replicas, tell)
        return self._coordinators.names

    async def _restart_gateway(self, tell: Tell) -> list[str]:
        """End the old one first: it has the ports. What it followed can be resubscribed at the new one."""
        if self._gateway is not None:
            await self._drain([self._gateway])
        self._gateway = self._begin_gateway()
        if self._gateway is None:
            tell("the gateway does not run any more")
            return [GATEWAY]
        await self._until_ready(self._gateway, tell)
        return [GATEWAY]

    async def _restart_sidecar(self, tell: Tell) -> list[str]:
        """End the old one first: it has the port. Agents ask again until the new one serves."""
        if self._sidecar is not None:
            await self._drain([self._sidecar])
        self._sidecar = self._begin_sidecar()
        if self._sidecar is None:
            tell("the sidecar does not run any more")
            return [SIDECAR]
        await self._until_ready(self._sidecar, tell)
        return [SIDECAR]

    async def _restart_broker(self, tell: Tell) -> list[str]:
        self._broker.bounce()
        if not await self._broker.reaches(State.READY, timeout=self._timing.ready_within):
            raise WeftError(f"the broker did not become ready: {self._broker.reason}")
        tell(f"broker is ready (pid {self._broker.pid})")
        return ["broker"]

    async def _set_replicas(self, config: AgentConfig, wanted: int, tell: Tell) -> None:
        running = self._replicas.setdefault(config.name, {})
        surplus = sorted(running)[wanted:]
        free = (n for n in range(1, MOST_REPLICAS + wanted + 1) if n not in running)
        fresh = [next(free) for _ in range(wanted - len(running))]
        for n in fresh:
            running[n] = self._launch(self._replica(config, n))
        leaving = [running.pop(n) for n in surplus]
        self._retiring += leaving
        try:
            await self._drain(leaving)
        finally:
            for process in leaving:
                self._retiring.remove(process)
        for process in leaving:
            tell(f"{process.name} is drained")
        for n in fresh:
            await self._until_ready(running[n], tell)

    async def _drain(self, processes: Iterable[Process]) -> None:
        """Have them finish what they do, all at once."""
        leaving = list(processes)
        for process in leaving:
            process.stop()
        for process in leaving:
            await process.reaches(State.STOPPED, timeout=process.spec.grace + self._timing.margin)

    def _unknown(self, name: str, known: Iterable[str]) -> NotFound:
        names = list(dict.fromkeys(known))
        has = ", ".join(names) or "nothing of the kind"
        return NotFound(f"this mesh has no {name!r}{did_you_mean(name, names)}; it has {has}")
