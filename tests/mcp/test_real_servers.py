"""Servers that other people wrote, of both eras, from their registries: registered, listed, called, killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from weft.client.tools import ToolClient, ToolRequest
from weft.core.toolsconf import SidecarConfig, ToolServer
from weft.core.toolstore import ToolStore
from weft.sidecar.service import SidecarService
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft-mcp-servers"
TIME = "mcp-server-time==2026.10.19"
MEMORY = "@modelcontextprotocol/server-memory@2026.8.31"
WITHIN = 60.0


def install(command: list[str], folder: Path) -> None:
    """Run an installer once; whoever has no registry at hand skips."""
    done = folder / ".installed"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=WITHIN)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"{command[-1]} cannot be installed: {error}")
    done.touch()


@pytest.fixture(scope="module")
def time_server() -> tuple[str, ...]:
    folder = CACHE / "time"
    if not (folder / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=WITHIN)
    install([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", TIME], folder)
    return (str(folder / "bin" / "python"), "-m", "mcp_server_time")


@pytest.fixture(scope="module")
def memory_server() -> tuple[str, ...]:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not here")
    folder = CACHE / "memory"
    install([npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--silent", MEMORY], folder)
    return (str(folder / "node_modules" / ".bin" / "mcp-server-memory"),)


class Bench:
    def __init__(self, client: ToolClient, store: ToolStore, service: SidecarService) -> None:
        self.client, self.store, self.service = client, store, service

    async def register(self, name: str, command: tuple[str, ...], **more: Any) -> None:
        await self.store.register(ToolServer(name, command=command, **more))
        await eventually(lambda: name in self.service.plane.servers)

    async def call(self, server: str, tool: str, **arguments: Any) -> dict[str, Any]:
        params = {"name": tool, "arguments": arguments}
        return await self.client.request(ToolRequest(server, "tools/call", params))


@pytest.fixture
async def bench(mesh: BrokerMesh) -> AsyncIterator[Bench]:
    async with AsyncExitStack() as stack:
        operator, sidecar, local = [await mesh.connect(name) for name in ("operator", "sidecar", "local")]
        for broker in (operator, sidecar, local):
            stack.push_async_callback(broker.close)
        service = SidecarService(sidecar, SidecarConfig())
        stack.push_async_callback(service.aclose)
        await service.start()
        client = await ToolClient(local).start()
        stack.push_async_callback(client.aclose)
        store = ToolStore(operator)
        for name in ("time", "memory"):
            stack.push_async_callback(store.remove, name)
        yield Bench(client, store, service)


async def test_a_server_of_this_revision_is_listed_called_killed_and_called_again(
    bench: Bench, time_server: tuple[str, ...]
) -> None:
    await bench.register("time", time_server)
    result = await bench.call("time", "get_current_time", timezone="Europe/Berlin")
    assert result["structuredContent"]["timezone"] == "Europe/Berlin"
    wrong = await bench.call("time", "get_current_time", timezone="Nowhere/Town")
    assert wrong["isError"]
    upstream = bench.service.plane.served("time").upstream
    assert upstream.state["version"] == "2026-07-28"
    link: Any = upstream.sessions[0].link
    os.killpg(link.pid, signal.SIGKILL)
    await eventually(lambda: not upstream.sessions)
    again = await bench.call("time", "get_current_time", timezone="Asia/Tokyo")
    assert again["structuredContent"]["timezone"] == "Asia/Tokyo"


async def test_a_server_of_the_earlier_era_is_listed_and_keeps_what_it_is_told(
    bench: Bench, memory_server: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_MEMORY_FILE", str(tmp_path / "memory.jsonl"))
    await bench.register("memory", memory_server, env={"MEMORY_FILE_PATH": "TEST_MEMORY_FILE"})
    listed = await bench.client.request(ToolRequest("memory", "tools/list"))
    assert {"create_entities", "read_graph"} <= {tool["name"] for tool in listed["tools"]}
    entity = {"name": "weft", "entityType": "project", "observations": ["weaves"]}
    await bench.call("memory", "create_entities", entities=[entity])
    assert "weaves" in (tmp_path / "memory.jsonl").read_text()
    graph = await bench.call("memory", "read_graph")
    assert graph["resultType"] == "complete"
    assert bench.service.plane.served("memory").upstream.state["version"] == "2025-11-25"
