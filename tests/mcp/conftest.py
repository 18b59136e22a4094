"""A sidecar in front of the conformance fixture, and the official suite from the registry."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from weft.client.tools import ToolClient
from weft.core.toolsconf import SidecarConfig, ToolServer
from weft.core.toolstore import ToolStore
from weft.testing.agents import Process
from weft.testing.broker import BrokerMesh
from weft.testing.policies import permit

# Without the extra `sidecar` there is nothing to test here.
collect_ignore_glob = [] if find_spec("mcp") is not None else ["test_*.py"]
HERE = Path(__file__).parent
KIT = "@modelcontextprotocol/conformance@0.2.0-alpha.12"
NODE = "node@22"
INSTALL_WITHIN = 60.0
RUN_WITHIN = 100.0
SCENARIO = re.compile(r"^([✓✗]) (\S+?): (\d+) passed, (\d+) failed", re.MULTILINE)
UNSCORED = re.compile(r"^  [✓✗] (\S+) \([a-z-]+\)", re.MULTILINE)


@dataclass(frozen=True)
class Report:
    """What a run of the suite found, by scenario."""

    passed: frozenset[str]
    failed: frozenset[str]
    unscored: frozenset[str]
    text: str

    @property
    def scored(self) -> frozenset[str]:
        return (self.passed | self.failed) - self.unscored


@pytest.fixture(scope="session")
def kit() -> Path:
    """The folder of the suite's commands, installed once for all runs; skipped where that takes over a minute."""
    named = os.environ.get("WEFT_MCP_KIT")
    cache = Path(named or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft-mcp-conformance"
    commands = cache / "node_modules" / ".bin"
    if (commands / "conformance").exists() and (commands / "node").exists():
        return commands
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not here, so the suite cannot be installed")
    cache.mkdir(parents=True, exist_ok=True)
    command = [npm, "install", "--prefix", str(cache), "--no-audit", "--no-fund", "--silent", NODE, KIT]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_WITHIN)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"the suite cannot be installed: {error}")
    return commands


@pytest.fixture(scope="session")
def conform(kit: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], asyncio.Future[Report]]:
    """Runs the suite for a revision against an address."""

    async def run(url: str, revision: str) -> Report:
        out = tmp_path_factory.mktemp("conformance")
        process = await asyncio.create_subprocess_exec(
            str(kit / "conformance"), "server", "--url", url, "--requirements", revision, "-o", str(out),
            env={**os.environ, "PATH": f"{kit}:{os.environ['PATH']}"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=out,
        )  # fmt: skip
        async with asyncio.timeout(RUN_WITHIN):
            raw, _ = await process.communicate()
        text = raw.decode(errors="replace")
        found = SCENARIO.findall(text)
        return Report(
            frozenset(name for mark, name, *_ in found if mark == "✓"),
            frozenset(name for mark, name, *_ in found if mark == "✗"),
            frozenset(UNSCORED.findall(text)),
            text,
        )

    return run  # type: ignore[return-value]


@dataclass(frozen=True)
class Places:
    """Where the fixture is reached, through the sidecar."""

    http: str
    """By its HTTP front."""
    nats: str
    """By an HTTP front in front of MCP over NATS in front of the sidecar."""


@pytest.fixture(scope="module")
async def places(mesh: BrokerMesh) -> AsyncIterator[Places]:
    from weft.sidecar.remote import RemoteBackend
    from weft.sidecar.service import SidecarService
    from weft.sidecar.tokens import Tokens
    from weft.sidecar.web import WebFront

    async with AsyncExitStack() as stack:
        fixture = Process((str(HERE / "everything.py"), "--port", "0"), ready="ready:", env=dict(os.environ))
        await stack.enter_async_context(fixture)
        operator, sidecar, caller = [await mesh.connect(name) for name in ("operator", "sidecar", "local")]
        for broker in (operator, sidecar, caller):
            stack.push_async_callback(broker.close)
        await permit(operator)
        store = ToolStore(operator)
        await store.register(
            ToolServer(
                "everything",
                settings={"egress": {"allow": ["127.0.0.1"]}},
                url=fixture.ready_line.removeprefix("ready: "),
            )
        )
        stack.push_async_callback(store.remove, "everything")
        service = SidecarService(sidecar, SidecarConfig(anonymous="local"))
        stack.push_async_callback(service.aclose)
        await service.start()
        client = await ToolClient(caller).start()
        stack.push_async_callback(client.aclose)
        hop = WebFront(RemoteBackend(client), Tokens(b"k"), anonymous="local", schema=service.schema)
        stack.push_async_callback(hop.drain, 0.0)
        await hop.start(0)
        yield Places(f"{service.web.url}/everything/mcp", f"{hop.url}/everything/mcp")


def pytest_report_header() -> str:
    return f"MCP conformance: {KIT}, python {sys.version_info.major}.{sys.version_info.minor}"
