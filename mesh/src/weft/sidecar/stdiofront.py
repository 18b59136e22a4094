"""MCP over the standard input and output of this process, for desktop clients: what `mesh mcp` runs."""

from __future__ import annotations

from mcp.server.stdio import stdio_server

from weft.client.tools import ToolClient
from weft.core.broker import Broker
from weft.core.config import ConnectionSettings
from weft.sidecar.mcpserver import Asker, Forwarder
from weft.sidecar.remote import RemoteBackend
from weft_protocols.mcp import EVERY


async def serve_stdio(settings: ConnectionSettings, server: str = EVERY) -> None:
    """Serve the tools of a mesh, or one server of it, as the identity of `settings`, until the input ends."""
    broker = await Broker.connect(settings, name="mesh mcp", timeout=15.0)
    client = ToolClient(broker)
    asker = Asker(settings.identity, server, front="stdio")
    forwarder = Forwarder(RemoteBackend(client), lambda _: asker)
    try:
        await client.start()
        async with stdio_server() as (read, write):
            await forwarder.server.run(read, write, forwarder.server.create_initialization_options())
    finally:
        await forwarder.aclose()
        await client.aclose()
        await broker.close()
