"""What it costs to call a tool through the sidecar: beside the server itself, and beside fastmcp as a proxy.

One tool server (MCP's SDK, streamable HTTP) is behind every side. The sidecar decides by 100 rules, redacts, records.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

from bench.processes import ROOT, Child, Children, memory_mb
from bench.roundtrip import Load, Side, in_turns
from bench.side_weft import replica

import weft
from weft.client.policies import PolicyStore
from weft.client.tools import ToolClient, ToolRequest
from weft.core.serverproc import free_port
from weft.core.toolsconf import ToolServer
from weft.core.toolstore import ToolStore
from weft.policy.bundle import Bundle
from weft.testing.broker import BrokerMesh, start_test_mesh

SIDES: Final = ("direct", "fastmcp", "http", "nats")
FASTMCP: Final = "fastmcp==4.1.2"
PEERS: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft-bench"
AGENT: Final = ROOT / "bench" / "tool_agent.py"
RULES: Final = 100
TEAMS: Final = 25
CALLS: Final = 1000
"""Calls after which the sidecar must have what it had before."""
WITHIN: Final = 60.0


async def run(load: Load) -> dict[str, Any]:
    """Every side under every load, in turns; and what 1,000 calls leave behind in the sidecar."""
    async with AsyncExitStack() as stack:
        children = await stack.enter_async_context(Children())
        url, upstream = await _server(children)
        mesh = await stack.enter_async_context(await start_test_mesh(["holder"]))
        sidecar = await _sidecar(children, mesh, url)
        address = await stack.enter_async_context(_address(children, mesh))
        proxy, peer = await _fastmcp(children, url)
        pids = {"server": upstream.pid}
        ours = {**pids, "sidecar": sidecar.pid, "broker": mesh.server.pid}
        sides = [
            await _side(children, "direct", "side_mcp", _json(url, "echo"), pids),
            await _side(children, "fastmcp", "side_mcp", _json(proxy, "echo"), {**pids, "sidecar": peer.pid}),
            await _side(children, "http", "side_mcp", address, ours),
            await _side(children, "nats", "side_tools", str(mesh.home), ours),
        ]
        records = await in_turns(sides, load)
        left = await _left(mesh, sidecar.pid)
    return {"records": records, "left": left, "rules": RULES}


def _json(url: str, tool: str, token: str = "") -> str:
    return json.dumps({"url": url, "tool": tool, "token": token})


async def _side(children: Children, name: str, module: str, address: str, pids: dict[str, int]) -> Side:
    client = await children.python(f"{name} client", "bench.load", module, address)
    if await client.line() != "ready":
        raise RuntimeError(f"{client.name} did not start")
    return Side(name, client, pids)


async def _server(children: Children) -> tuple[str, Child]:
    port = free_port()
    child = await children.python("tool server", "bench.mcp_server", str(port), stdout=False)
    url = f"http://127.0.0.1:{port}/mcp"
    await _listens(url)
    return url, child


async def _listens(url: str) -> None:
    """Return when a server answers, whatever."""

    def look() -> None:
        until = time.monotonic() + WITHIN
        while not answers():
            if time.monotonic() > until:
                raise RuntimeError(f"nothing answers at {url}")
            time.sleep(0.05)

    def answers() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    await asyncio.to_thread(look)


async def _sidecar(children: Children, mesh: BrokerMesh, url: str) -> Child:
    """A sidecar with the server registered and 100 rules loaded, once it decides by them."""
    operator = await mesh.connect("operator")
    try:
        guards = {"egress": {"allow": ["127.0.0.1"]}}
        await ToolStore(operator).register(ToolServer("echo", url=url, settings={"concurrency": 64, **guards}))
        store = PolicyStore(operator)
        made = await store.store(Bundle.of({"rules.cedar": _rules()}), author="bench", rules=RULES)
        await store.point(made.number, by="bench", how="load")
    finally:
        await operator.close()
    env = {"WEFT_HOME": str(mesh.home), "WEFT_IDENTITY": "sidecar", "WEFT_LOG": "ERROR", "WEFT_SIDECAR_PORT": "0"}
    child = await children.python("sidecar", "weft.sidecar", env=env, stdout=False, stderr=subprocess.PIPE)
    await children.said(child, b"ready")
    return child


def _rules() -> str:
    """As many permits as `RULES`: one for this tool, and those of other teams for theirs."""
    made = ['@id("echo") permit (principal, action == Action::"call", resource == Tool::"echo.echo");']
    made += [
        f'@id("r{n}") permit (principal == Agent::"team{n % TEAMS}", action == Action::"call", '
        f'resource == Tool::"echo.echo") when {{ context.args.text like "*{n}*" }};'
        for n in range(RULES - 1)
    ]
    return "\n".join(made)


@asynccontextmanager
async def _address(children: Children, mesh: BrokerMesh) -> AsyncIterator[str]:
    """The sidecar's HTTP front, with a task's token, while that task runs."""
    await replica(children, mesh.home, target=AGENT, agent="holder")
    async with weft.connect("local", home=mesh.home) as caller, await caller.submit("holder", "go") as handle:
        async with asyncio.timeout(WITHIN):
            told = [event.text async for event in _until(handle.events())][-1]
        url, token = told.split()
        yield _json(url, "echo__echo", token)
        await handle.cancel()


async def _until(events: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The first event that says something."""
    async for event in events:
        if event.text:
            yield event
            return


async def _fastmcp(children: Children, url: str) -> tuple[str, Child]:
    """fastmcp's proxy, installed once in a folder of its own."""
    python = PEERS / FASTMCP / "bin" / "python"
    if not (PEERS / FASTMCP / ".installed").exists():
        await asyncio.to_thread(_install, python)
    port = free_port()
    program = ROOT / "bench" / "peer_fastmcp.py"
    child = await children.start("fastmcp", python, program, str(port), url, stdout=False, stderr=subprocess.DEVNULL)
    made = f"http://127.0.0.1:{port}/mcp"
    await _listens(made)
    return made, child


def _install(python: Path) -> None:
    folder = python.parent.parent
    sys.stderr.write(f"installing {FASTMCP} to {folder}\n")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", FASTMCP], check=True)
    (folder / ".installed").touch()


async def _left(mesh: BrokerMesh, sidecar: int) -> dict[str, Any]:
    """Descriptors, processes and megabytes of the sidecar before and after `CALLS` calls."""
    broker = await mesh.connect("local")
    try:
        caller = await ToolClient(broker).start()
        request = ToolRequest("echo", "tools/call", {"name": "echo", "arguments": {"text": "x" * 256}})
        before = _has(sidecar)
        for _ in range(CALLS):
            await caller.request(request)
        after = _has(sidecar)
        await caller.aclose()
    finally:
        await broker.close()
    return {name: round(after[name] - before[name], 1) for name in before}


def _has(pid: int) -> dict[str, float]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "processes": len(children),
        "mb": memory_mb(pid),
    }
