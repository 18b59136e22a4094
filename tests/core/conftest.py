"""Shared by the tests of the embedded broker and of connections to it."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from weft.core import broker as broker_module
from weft.core.broker import Broker
from weft.testing.broker import BrokerMesh
from weft.testing.outages import Connect


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "project" / ".weft"


@pytest.fixture
def fake_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a nats-server out of a shell script and has it used."""

    def make(script: str) -> Path:
        path = tmp_path / "nats-server"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("WEFT_NATS_SERVER", str(path))
        return path

    return make


@pytest.fixture
async def connect(anyio_backend: str) -> AsyncIterator[Connect]:
    """Connections that are closed when the test is over."""
    opened: list[Broker] = []

    async def open_one(mesh: BrokerMesh, identity: str = "coordinator") -> Broker:
        opened.append(await mesh.connect(identity))
        return opened[-1]

    yield open_one
    for broker in opened:
        await broker.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stalled server is noticed in about a second instead of fifteen."""
    monkeypatch.setattr(broker_module, "PING_INTERVAL", 0.2)
    monkeypatch.setattr(broker_module, "CONNECT_ATTEMPT", 0.5)
