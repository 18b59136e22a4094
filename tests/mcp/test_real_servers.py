"""Servers that other people wrote, of both eras, from their registries: registered, listed, called, killed, hung.

What a call did is looked up outside: in a file, a log of commits, a database, or what a web server was asked.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from weft.client.tools import ToolClient, ToolRequest
from weft.core.toolsconf import SidecarConfig, ToolServer
from weft.core.toolstore import ToolStore
from weft.sidecar.guards import SandboxRules
from weft.sidecar.sandbox import choose
from weft.sidecar.service import SidecarService
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh
from weft.testing.policies import permit
from weft_protocols import mcp

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft-mcp-servers"
WITHIN = 150.0
"""Seconds to install one server; only the first run on a machine does."""
LIMIT = 30.0
"""Seconds of one call."""
SHORT = 1.0
"""Seconds that the caller of a server that hangs waits."""
EARLIER, LATER = "2025-11-25", "2026-07-28"


class Site:
    """A web server on this machine, and the paths it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.address = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        path = lines[0].split()[1]
        self.asked.append(path)
        page = (
            b"" if path == "/robots.txt" else b"<html><body><h1>Woven</h1><p>" + b"thread " * 40 + b"</p></body></html>"
        )
        status = "404 Not Found" if path == "/robots.txt" else "200 OK"
        head = (
            f"HTTP/1.1 {status}\r\ncontent-type: text/html\r\ncontent-length: {len(page)}\r\nconnection: close\r\n\r\n"
        )
        writer.write(head.encode() + page)
        await writer.drain()
        writer.close()


@dataclass
class World:
    """Where the effects of calls are."""

    folder: Path
    site: Site

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)


Effect = Callable[[World, int], tuple[str, dict[str, Any]]]
"""Tool and arguments of the n-th call."""
Seen = Callable[[World, int, dict[str, Any]], bool]
"""Whether the n-th call with this result had its effect."""


@dataclass(frozen=True)
class Real:
    """A server and how a user would register it."""

    package: str
    version: str
    """Of MCP, which it speaks."""
    command: Callable[[World], tuple[str, ...]]
    """After the program."""
    tools: frozenset[str]
    """Some of what it offers."""
    effect: Effect
    seen: Seen
    sandbox: Callable[[World], Any] = lambda world: None
    program: str = ""
    """The command that the package brings."""
    env: dict[str, str] = field(default_factory=dict)
    npm: bool = False
    beside: tuple[str, ...] = ()
    """What has to be installed with it."""
    ready: str = ""
    """Python that completes the installation."""


def wrote(world: World, n: int) -> tuple[str, dict[str, Any]]:
    return "write_file", {"path": str(world.path("files", f"{n}.txt")), "content": f"call {n}"}


def committed(world: World, n: int) -> tuple[str, dict[str, Any]]:
    return "git_commit", {"repo_path": str(world.path("repo")), "message": f"call {n}"}


def git(world: World, *arguments: str) -> str:
    command = ["git", "-C", str(world.path("repo")), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def log_of(world: World) -> list[str]:
    return git(world, "log", "--format=%s").split("\n")


def rows(world: World) -> list[str]:
    base = sqlite3.connect(world.path("data", "base.db"))
    try:
        return [one for (one,) in base.execute("SELECT note FROM notes")]
    finally:
        base.close()


def remembered(world: World, n: int) -> tuple[str, dict[str, Any]]:
    entity = {"name": f"weft-{n}", "entityType": "project", "observations": [f"call {n}"]}
    return "create_entities", {"entities": [entity]}


SERVERS = {
    "time": Real(
        "mcp-server-time==2026.10.19",
        LATER,
        lambda world: (),
        frozenset({"get_current_time", "convert_time"}),
        lambda world, n: ("get_current_time", {"timezone": ("Europe/Berlin", "Asia/Tokyo", "UTC")[n % 3]}),
        lambda world, n, result: (
            result["structuredContent"]["timezone"] == ("Europe/Berlin", "Asia/Tokyo", "UTC")[n % 3]
        ),
        lambda world: {"network": False},
        "mcp-server-time",
    ),
    "git": Real(
        "mcp-server-git==2026.10.19",
        LATER,
        lambda world: ("--repository", str(world.path("repo"))),
        frozenset({"git_status", "git_commit"}),
        committed,
        lambda world, n, result: f"call {n}" in log_of(world),
        lambda world: {"write": [str(world.path("repo"))], "network": False},
        "mcp-server-git",
    ),
    "fetch": Real(
        "mcp-server-fetch==2026.10.24",
        LATER,
        lambda world: ("--ignore-robots-txt", "--allow-private-ips"),
        frozenset({"fetch"}),
        lambda world, n: ("fetch", {"url": f"{world.site.address}/{n}"}),
        lambda world, n, result: f"/{n}" in world.site.asked and "Woven" in json.dumps(result),
        lambda world: None,
        "mcp-server-fetch",
        ready="from readabilipy.simple_json import have_node; have_node()",  # what its first call would install
    ),
    "sqlite": Real(
        "mcp-server-sqlite==2025.4.25",
        EARLIER,
        lambda world: ("--db-path", str(world.path("data", "base.db"))),
        frozenset({"read_query", "write_query"}),
        lambda world, n: ("write_query", {"query": f"INSERT INTO notes VALUES ('call {n}')"}),
        lambda world, n, result: f"call {n}" in rows(world),
        lambda world: {"write": [str(world.path("data"))], "network": False},
        "mcp-server-sqlite",
        beside=("mcp==1.29.1",),  # it does not start with the SDK of the later era, which it would accept
    ),
    "memory": Real(
        "@modelcontextprotocol/server-memory@2026.8.31",
        EARLIER,
        lambda world: (),
        frozenset({"create_entities", "read_graph"}),
        remembered,
        lambda world, n, result: f"call {n}" in world.path("memory.jsonl").read_text(),
        lambda world: {"network": False},
        "mcp-server-memory",
        {"MEMORY_FILE_PATH": "TEST_MEMORY_FILE"},
        npm=True,
    ),
    "filesystem": Real(
        "@modelcontextprotocol/server-filesystem@2026.8.31",
        EARLIER,
        lambda world: (str(world.path("files")),),
        frozenset({"read_text_file", "write_file"}),
        wrote,
        lambda world, n, result: world.path("files", f"{n}.txt").read_text() == f"call {n}",
        lambda world: {"write": [str(world.path("files"))], "network": False},
        "mcp-server-filesystem",
        npm=True,
    ),
    "everything": Real(
        "@modelcontextprotocol/server-everything@2026.8.31",
        EARLIER,
        lambda world: (),
        frozenset({"echo"}),
        lambda world, n: ("echo", {"message": f"call {n}"}),
        lambda world, n, result: f"call {n}" in json.dumps(result),
        lambda world: {"network": False},
        "mcp-server-everything",
        npm=True,
    ),
}


# Installing ----------------------------------------------------------------------------------------


def install(name: str, real: Real) -> str:
    """Install a server once; why it cannot be, else nothing."""
    folder, done = CACHE / name, CACHE / name / f".installed-{real.package.rpartition('/')[2]}"
    if done.exists():
        return ""
    npm = shutil.which("npm")
    if real.npm and npm is None:
        return "npm is not here"
    python = str(folder / "bin" / "python")
    steps = [[str(npm), "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--silent", real.package]]
    if not real.npm:
        steps = [
            [sys.executable, "-m", "venv", str(folder)],
            [python, "-m", "pip", "install", "-q", real.package, *real.beside],
            [python, "-c", real.ready],
        ]
    shutil.rmtree(folder, ignore_errors=True)  # what an installation that was broken off left
    folder.mkdir(parents=True)
    try:
        for step in steps:
            subprocess.run(step, check=True, capture_output=True, timeout=WITHIN)
    except subprocess.CalledProcessError as error:
        return f"{real.package} cannot be installed: {error.stderr.decode(errors='replace')[-400:]}"
    except (subprocess.SubprocessError, OSError) as error:
        return f"{real.package} cannot be installed: {error}"
    done.touch()
    return ""


def program(name: str, real: Real) -> tuple[str, ...]:
    if real.npm:
        return (str(CACHE / name / "node_modules" / ".bin" / real.program),)
    return (str(CACHE / name / "bin" / real.program),)


# The stage -----------------------------------------------------------------------------------------


class Bench:
    def __init__(self, client: ToolClient, store: ToolStore, service: SidecarService, world: World) -> None:
        self.client, self.store, self.service, self.world = client, store, service, world
        self.absent: dict[str, str] = {}
        """Why a server is not here."""

    async def register(self, name: str, **more: Any) -> None:
        real = SERVERS[name]
        before = self.service.plane._served.get(name)
        settings: dict[str, Any] = {"timeout": LIMIT, "start_timeout": 60, **more}
        if (rules := real.sandbox(self.world)) is not None:
            settings["sandbox"] = rules
        command = (*program(name, real), *real.command(self.world))
        await self.store.register(
            ToolServer(name, command=command, env=real.env, cwd=str(self.world.folder), settings=settings)
        )
        await eventually(lambda: self.service.plane._served.get(name) not in (None, before))

    async def call(self, server: str, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return await self.client.request(ToolRequest(server, "tools/call", {"name": tool, "arguments": arguments}))

    async def started(self, name: str) -> None:
        """Have it started, which may take longer than a call may."""

        async def is_there() -> bool:
            try:
                async with asyncio.timeout(0.5):
                    await self.service.plane.served(name).refresh()
            except TimeoutError:
                return False
            return True

        await eventually(is_there, timeout=60)

    async def effect(self, name: str, n: int) -> dict[str, Any]:
        """The n-th call of a server; it had its effect."""
        real, world = SERVERS[name], self.world
        if name == "git":
            world.path("repo", f"{n}").write_text(str(n))
            await asyncio.to_thread(git, world, "add", ".")
        result = await self.call(name, *real.effect(world, n))
        assert not result.get("isError"), result
        assert real.seen(world, n, result), result
        return result

    def upstream(self, name: str) -> Any:
        return self.service.plane.served(name).upstream

    def processes(self, name: str) -> list[int]:
        """The processes of a server, the sandbox around it first."""
        link: Any = self.upstream(name).sessions[0].link
        return [link.pid, *below(link.pid)]


def below(pid: int) -> Iterator[int]:
    """What descends from a process."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield int(child)
        yield from below(int(child))


@pytest.fixture(scope="module")
async def bench(mesh: BrokerMesh, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    world = World(tmp_path_factory.mktemp("real"), Site())
    for name in ("files", "repo", "data"):
        world.path(name).mkdir()
    await asyncio.to_thread(git, world, "init", "-q")
    for key, value in (("user.name", "Ada"), ("user.email", "ada@example.org"), ("commit.gpgsign", "false")):
        await asyncio.to_thread(git, world, "config", key, value)
    base = sqlite3.connect(world.path("data", "base.db"))
    base.execute("CREATE TABLE notes (note TEXT)")
    base.close()
    async with AsyncExitStack() as stack:
        site = await asyncio.start_server(world.site.serve, "127.0.0.1", 0)
        stack.callback(site.close)
        world.site.address = f"http://127.0.0.1:{site.sockets[0].getsockname()[1]}"
        os.environ["TEST_MEMORY_FILE"] = str(world.path("memory.jsonl"))
        stack.callback(os.environ.pop, "TEST_MEMORY_FILE")
        operator, sidecar, local = [await mesh.connect(name) for name in ("operator", "sidecar", "local")]
        for broker in (operator, sidecar, local):
            stack.push_async_callback(broker.close)
        await permit(operator)
        service = SidecarService(sidecar, SidecarConfig())
        stack.push_async_callback(service.aclose)
        await service.start()
        client = await ToolClient(local).start()
        stack.push_async_callback(client.aclose)
        made = Bench(client, ToolStore(operator), service, world)
        async with asyncio.TaskGroup() as group:
            found = {name: group.create_task(asyncio.to_thread(install, name, real)) for name, real in SERVERS.items()}
        made.absent = {name: task.result() for name, task in found.items() if task.result()}
        for name in SERVERS.keys() - made.absent.keys():
            await made.register(name)
            stack.push_async_callback(made.store.remove, name)
        # All of them start at once. What is wrong with one is what its own tests find.
        asked = [client.request(ToolRequest(name, "tools/list")) for name in SERVERS.keys() - made.absent.keys()]
        await asyncio.gather(*asked, return_exceptions=True)
        yield made


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, bench: Bench) -> str:
    name = str(request.param)
    if name in bench.absent:
        pytest.skip(bench.absent[name])
    return name


async def test_a_real_server_is_listed_and_called_in_the_sandbox_there_is(bench: Bench, server: str) -> None:
    real = SERVERS[server]
    listed = await bench.client.request(ToolRequest(server, "tools/list"))
    assert real.tools <= {tool["name"] for tool in listed["tools"]}
    assert listed["resultType"] == "complete"
    await bench.effect(server, 0)
    state = bench.upstream(server).state
    assert (state["version"], state["sandbox"]) == (real.version, choose(SandboxRules()).name)


async def test_a_real_server_that_is_killed_is_called_again(bench: Bench, server: str) -> None:
    await bench.effect(server, 1)
    upstream, before = bench.upstream(server), bench.processes(server)
    restarts = upstream.restarts
    os.kill(before[-1], signal.SIGKILL)
    await eventually(lambda: upstream.restarts > restarts)
    await bench.effect(server, 2)
    assert not set(before) & set(bench.processes(server))


async def test_a_real_server_that_hangs_is_given_up_in_time_and_replaced(
    bench: Bench, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.sidecar.session.PROBE", 0.5)
    monkeypatch.setattr("weft.sidecar.stdio.LEAVE", 0.5)
    await bench.register(server, timeout=SHORT)
    await bench.started(server)
    before = bench.processes(server)
    restarts = bench.upstream(server).restarts
    os.kill(before[-1], signal.SIGSTOP)
    begun = time.monotonic()
    late = await bench.call(server, *SERVERS[server].effect(bench.world, 4))
    assert late["_meta"][mcp.META_REFUSAL]["kind"] == "late"
    assert SHORT <= time.monotonic() - begun < SHORT + 5
    await eventually(lambda: bench.upstream(server).restarts > restarts and not alive(before))
    await bench.started(server)  # although nobody waits for it as long as it takes
    await bench.register(server)
    await bench.effect(server, 5)


async def test_a_real_server_that_is_registered_anew_is_restarted(bench: Bench, server: str) -> None:
    await bench.effect(server, 6)
    before = bench.processes(server)
    await bench.register(server, concurrency=4)
    await bench.effect(server, 7)
    await eventually(lambda: not alive(before))
    assert bench.upstream(server).limits.concurrency == 4


def alive(pids: list[int]) -> bool:
    return any(Path(f"/proc/{pid}").exists() for pid in pids)
