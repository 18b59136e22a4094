"""A tool plane on the module's broker, in front of a server that misbehaves as it is told."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from weft.client.tools import ToolClient, ToolRequest
from weft.core.broker import Broker
from weft.core.toolsconf import SidecarConfig, ToolServer
from weft.core.toolstore import ToolStore
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh, unique_name
from weft.testing.policies import permit
from weft_protocols.mcp import META_STEP

if TYPE_CHECKING:
    from weft.sidecar.service import SidecarService

# Without the extra `sidecar` there is nothing to test here.
collect_ignore_glob = [] if find_spec("mcp") is not None else ["test_*.py"]
BAD = Path(__file__).with_name("badserver.py")
RUNNER = Path(__file__).with_name("runner.py")


@dataclass
class Stage:
    """A sidecar, a caller, the operator, and servers registered on the way."""

    service: SidecarService
    caller: ToolClient
    operator: ToolClient
    store: ToolStore
    broker: Broker
    """The caller's connection."""
    folder: Path
    names: list[str] = field(default_factory=list)

    async def bad(self, *flags: str, trust: str = "first-use", **settings: Any) -> str:
        """Register the misbehaving server; its name."""
        name = unique_name("bad")
        (self.folder / name).mkdir()
        command = (sys.executable, "-S", str(BAD), str(self.folder / name), *flags)
        await self.register(ToolServer(name, command=command, trust=trust, settings=settings))
        return name

    async def runner(self, *, env: dict[str, str] | None = None, **settings: Any) -> str:
        """Register the server that runs the Python it is given; its name."""
        name = unique_name("run")
        (self.folder / name).mkdir()
        command = (sys.executable, "-S", str(RUNNER), str(self.folder / name))
        folder = str(self.folder / name)
        await self.register(ToolServer(name, command=command, cwd=folder, env=env or {}, settings=settings))
        return name

    async def run(self, server: str, code: str, *, tool: str = "run", **more: Any) -> dict[str, Any]:
        """Have it run some Python."""
        params: dict[str, Any] = {"name": tool, "arguments": {"code": code}, **more}
        return await self.caller.request(ToolRequest(server, "tools/call", params))

    async def code(self, **settings: Any) -> str:
        """Register the built-in server that runs code of agents; its name."""
        name = unique_name("code")
        await self.register(ToolServer(name, builtin="code", settings=settings))
        return name

    async def python(
        self, server: str, source: str, *, task: str = "", step: str = "", deadline: float | None = None, **inputs: Any
    ) -> dict[str, Any]:
        """Have the built-in server run some Python, as part of a task."""
        arguments = {"code": source, **({"inputs": inputs} if inputs else {})}
        params: dict[str, Any] = {"name": "run", "arguments": arguments}
        if step:
            params["_meta"] = {META_STEP: step}
        chain = f"boss/t0,{self.broker.settings.identity}/{task}" if task else ""
        return await self.caller.request(ToolRequest(server, "tools/call", params, chain=chain, deadline=deadline))

    async def register(self, server: ToolServer) -> None:
        await self.store.register(server)
        self.names.append(server.name)
        await eventually(lambda: server.name in self.service.plane.servers)

    async def do(self, server: str, what: str, n: int = 1, *, heard: Any = None, **more: Any) -> dict[str, Any]:
        """Call the server's one tool."""
        params: dict[str, Any] = {"name": "do", "arguments": {"what": what, "n": n}, **more}
        return await self.caller.request(ToolRequest(server, "tools/call", params), heard=heard)

    async def ask(self, server: str, method: str, /, **params: Any) -> dict[str, Any]:
        return await self.caller.request(ToolRequest(server, method, params))

    async def operate(self, method: str, /, **params: Any) -> dict[str, Any]:
        return await self.operator.request(ToolRequest("_", method, params))

    def state(self, server: str) -> Path:
        return self.folder / server

    def started(self, server: str) -> list[int]:
        """Pids of its processes so far."""
        file = self.state(server) / "started"
        return [int(line) for line in file.read_text().split()] if file.exists() else []


def text(result: dict[str, Any]) -> str:
    return str(result["content"][0]["text"])


@pytest.fixture
def said() -> Callable[[dict[str, Any]], str]:
    """The first text of a result."""
    return text


@pytest.fixture(scope="module")
async def running(mesh: BrokerMesh, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    from weft.sidecar.service import SidecarService

    async with AsyncExitStack() as stack:

        async def connect(name: str) -> Broker:
            broker = await mesh.connect(name)
            stack.push_async_callback(broker.close)
            return broker

        operator, local = await connect("operator"), await connect("local")
        await permit(operator)
        service = SidecarService(await connect("sidecar"), SidecarConfig())
        stack.push_async_callback(service.aclose)
        await service.start()
        caller, operating = [await ToolClient(broker).start() for broker in (local, operator)]
        for client in (caller, operating):
            stack.push_async_callback(client.aclose)
        yield Stage(service, caller, operating, ToolStore(operator), local, tmp_path_factory.mktemp("servers"))


@pytest.fixture
async def stage(running: Stage) -> AsyncIterator[Stage]:
    """The module's sidecar, without servers."""
    yield running
    names, running.names = running.names, []
    for name in names:
        await running.store.remove(name)
    await eventually(lambda: not set(names) & running.service.plane.servers.keys())
