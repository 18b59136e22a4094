"""A real broker with a mesh's accounts and streams, for tests. Free of any test framework."""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from weft.core.broker import Broker
from weft.core.config import DEFAULT_IDENTITY, ConnectionSettings
from weft.core.server import EmbeddedServer
from weft.core.topology import Report, reconcile
from weft_protocols.resources import topology


def unique_name(prefix: str = "agent") -> str:
    """A name no other test uses: the prefix and eight random hex digits."""
    return f"{prefix}-{uuid.uuid4().hex[:8]}"


@dataclass(slots=True)
class BrokerMesh:
    """A running broker with accounts, streams and consumers, and nothing else of a mesh."""

    server: EmbeddedServer
    durability: str
    temporary: Path | None = None
    """Directory that goes with it."""

    @property
    def home(self) -> Path:
        """The home directory (`WEFT_HOME`)."""
        return self.server.home.root

    @property
    def url(self) -> str:
        """Address of the server."""
        return self.server.url

    def settings(self, identity: str) -> ConnectionSettings:
        """How an identity connects."""
        return self.server.settings(identity)

    async def connect(self, identity: str) -> Broker:
        """A connection as that identity; the caller closes it."""
        return await Broker.connect(self.settings(identity), name=f"test {identity}")

    async def add_agent(self, *names: str) -> None:
        """Declare agents and create their consumers; they can work when this returns."""
        await self.server.declare(agents=names)
        await self.apply_topology()

    async def add_caller(self, *names: str) -> None:
        """Declare callers."""
        await self.server.declare(callers=names)

    async def apply_topology(self) -> Report:
        """Create the streams, and the consumers of every declared agent."""
        operator = await self.connect("coordinator")
        try:
            return await reconcile(operator, topology(tuple(self.server.accounts.agents), self.durability))
        finally:
            await operator.close()

    async def aclose(self) -> None:
        """Stop the server and remove what it left."""
        # A server with the accounts of a whole test session takes its time to end in order, for nobody.
        await (self.server.stop() if self.temporary is None else self.server.stop(grace=0))
        if self.temporary is not None:
            # By another process: a thread would wait for this one's lock at every one of thousands of files.
            remove = ("rm", "-rf", "--", str(self.temporary))
            await asyncio.to_thread(subprocess.run, remove, check=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


async def start_test_mesh(
    agents: Iterable[str] = (),
    callers: Iterable[str] = (DEFAULT_IDENTITY,),
    *,
    home: Path | None = None,
    durability: str = "laptop",
    port: int = 0,
) -> BrokerMesh:
    """Start a broker with these accounts, and the streams and consumers they need.

    Args:
        agents: Names of agents.
        callers: Names of callers; `local` is what clients use by default.
        home: Home directory to use and to keep; a temporary one otherwise.
        durability: Profile of `weft_protocols.resources.DURABILITY`.
        port: TCP port; 0 for a free one.
    """
    temporary = Path(tempfile.mkdtemp(prefix="weft-test-")) if home is None else None
    server = EmbeddedServer(
        home or (temporary or Path()) / ".weft",
        durability=durability,
        port=port,
        agents=agents,
        callers=callers,
        orphan_protection=threading.current_thread() is threading.main_thread(),
    )
    mesh = BrokerMesh(server, durability, temporary)
    try:
        await server.start()
        await mesh.apply_topology()
    except BaseException:
        await mesh.aclose()
        raise
    return mesh
