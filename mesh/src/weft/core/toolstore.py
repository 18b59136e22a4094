"""Which tool servers are registered, and what of their definitions is approved: the stream `MESH_TOOLS`."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from weft.core.latest import Latest
from weft.core.toolsconf import ToolServer
from weft_protocols.errors import InvalidConfig
from weft_protocols.resources import TOOL_PINS, TOOL_SERVERS, TOOLS

if TYPE_CHECKING:
    from weft.core.broker import Broker

log = logging.getLogger("weft.tools")


class ToolStore:
    """Registrations and pins, over a connection of account MESH."""

    def __init__(self, broker: Broker) -> None:
        self.servers = Latest(broker, TOOLS, TOOL_SERVERS)
        self.pins = Latest(broker, TOOLS, TOOL_PINS)

    async def registered(self) -> dict[str, ToolServer]:
        """Every server by name. One that cannot be read is left out, and said in the log."""
        made: dict[str, ToolServer] = {}
        for name, record in (await self.servers.all()).items():
            try:
                made[name] = ToolServer.decode(record.data)
            except InvalidConfig as error:
                log.warning("%s: %s", name, error)
        return made

    async def get(self, name: str) -> ToolServer | None:
        """One server, None if it is not registered."""
        record = await self.servers.get(name)
        return ToolServer.decode(record.data) if record is not None else None

    async def register(self, server: ToolServer) -> None:
        """Store a server; an earlier one of its name is replaced."""
        await self.servers.put(server.name, server.encode())

    async def remove(self, name: str) -> None:
        """Remove a server and what of it was approved."""
        await self.servers.remove(name)
        await self.pins.remove(name)

    async def declare(self, servers: Iterable[ToolServer]) -> list[str]:
        """Make the servers that `mesh.yaml` declares exactly these; the names of those that changed."""
        wanted = {server.name: server for server in servers}
        known = await self.registered()
        changed = []
        for name, server in wanted.items():
            if known.get(name) != server:
                await self.register(server)
                changed.append(name)
        for name, server in known.items():
            if server.source == "mesh.yaml" and name not in wanted:
                await self.remove(name)
                changed.append(name)
        return changed
