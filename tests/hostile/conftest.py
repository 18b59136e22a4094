"""A sidecar in front of a server that does whatever a case says, and writes down what reached it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from weft.core.broker import Broker
from weft.core.toolsconf import ToolServer
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh, unique_name
from weft_protocols.audit import AuditRecord
from weft_protocols.resources import AUDIT

# Without the extra `sidecar` there is nothing to test here.
collect_ignore_glob = [] if find_spec("mcp") is not None else ["test_*.py"]
HERE = Path(__file__).parent
SIDECAR = HERE.parent / "sidecar" / "conftest.py"


def _stage() -> Any:
    """The stage of the sidecar's own tests."""
    spec = importlib.util.spec_from_file_location("sidecar_stage", SIDECAR)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


_MODULE = _stage()
running = _MODULE.running
stage = _MODULE.stage


class Hostile:
    """Servers that do as they are told, and what was forwarded and recorded."""

    def __init__(self, stage: Any, broker: Broker) -> None:
        self.stage = stage
        self.broker = broker

    async def server(self, *, answer: str = "", offer: Any = None, flags: tuple[str, ...] = (), **settings: Any) -> str:
        """Register one; its name."""
        name = unique_name("evil")
        self.folder(name).mkdir()
        self.says(name, answer)
        if offer is not None:
            self.offers(name, offer)
        command = (sys.executable, "-S", str(HERE / "server.py"), str(self.folder(name)), *flags)
        await self.stage.register(ToolServer(name, command=command, settings=settings))
        return name

    def folder(self, name: str) -> Path:
        return Path(self.stage.folder / name)

    def says(self, name: str, answer: str) -> None:
        """What it writes when a tool is called: Python that makes bytes."""
        (self.folder(name) / "answer.py").write_text(answer, encoding="utf-8")

    def offers(self, name: str, tools: Any) -> None:
        (self.folder(name) / "offer.json").write_text(json.dumps(tools))

    def reached(self, name: str, method: str = "tools/call") -> list[dict[str, Any]]:
        """The params of every request of a method that reached the server."""
        file = self.folder(name) / "reached.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [one["params"] for one in map(json.loads, lines) if one.get("method") == method]

    async def recorded(self, name: str, kind: str, caller: str = "local") -> AuditRecord:
        """The last record of a kind about a server, once there is one."""

        async def found() -> Any:
            return await self.broker.last(AUDIT, f"mesh.audit.{kind}.{caller}.{name}")

        return AuditRecord.decode((await eventually(found)).data)


@pytest.fixture
async def hostile(stage: Any, mesh: BrokerMesh) -> AsyncIterator[Hostile]:
    broker = await mesh.connect("sidecar")
    yield Hostile(stage, broker)
    await broker.close()
