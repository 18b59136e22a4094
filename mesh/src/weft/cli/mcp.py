"""`mesh mcp`: the tools of this mesh for a desktop client."""

from __future__ import annotations

import sys

import click


@click.command()
@click.argument("server", default="_")
def command(server: str) -> None:
    """Serve the tools of the mesh here, or those of SERVER, over standard input and output (MCP).

    For clients that start a command, as their entry for an MCP server. It calls tools as WEFT_IDENTITY, which is
    `local` unless it is set, through the sidecar like everybody else.
    """
    import asyncio
    import logging

    from weft.core.config import load_settings
    from weft.core.toolsconf import INSTALL, missing_modules
    from weft_protocols.errors import Unavailable

    if missing := missing_modules():
        raise Unavailable(f"this needs {', '.join(missing)}, which is not installed: {INSTALL}")
    from weft.sidecar.stdiofront import serve_stdio

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    asyncio.run(serve_stdio(load_settings(), server))
