"""`python -m weft.sidecar`: one sidecar until SIGTERM or SIGINT.

Prints `ready` on standard error when it serves. Exit code 0 when it was told to stop, else that of the error.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from dataclasses import replace

from weft.core import process
from weft.core.config import ConnectionSettings, load_settings, own_mesh_config
from weft.core.toolsconf import INSTALL, SidecarConfig, missing_modules
from weft_protocols.errors import InvalidConfig, Unavailable

IDENTITY = "sidecar"


def load_sidecar_config(connection: ConnectionSettings) -> SidecarConfig:
    """Section `sidecar` of `mesh.yaml`; `WEFT_SIDECAR_PORT` and `WEFT_SIDECAR_PRESIDIO` win. Raises InvalidConfig."""
    found = own_mesh_config(connection)
    config = found.sidecar if found is not None else SidecarConfig()
    config = replace(config, presidio=os.environ.get("WEFT_SIDECAR_PRESIDIO", config.presidio))
    port = os.environ.get("WEFT_SIDECAR_PORT")
    if port is None:
        return config
    if not port.isdigit() or int(port) > 65535:
        raise InvalidConfig(f"WEFT_SIDECAR_PORT is {port!r}; it must be a port from 0 to 65535")
    return replace(config, port=int(port))


async def serve(connection: ConnectionSettings, config: SidecarConfig, *, grace: float) -> None:
    """Connect, serve until a signal, drain."""
    from weft.core.broker import Broker
    from weft.core.home import Home
    from weft.sidecar.service import SidecarService

    stop = asyncio.Event()
    process.leave_when_told(stop.set)
    broker = await Broker.connect(connection, name=IDENTITY, timeout=15.0)
    try:
        home = Home(connection.home) if connection.home is not None else None
        service = SidecarService(broker, config, home=home)
        try:
            await service.start()
            process.say(f"ready: sidecar with {len(service.plane.servers)} tool servers, HTTP at {service.web.url}/mcp")
            process.collect_seldom()
            await service.run(stop)
            await service.drain(grace)
        finally:
            await service.aclose()
    finally:
        await broker.close()


def main() -> int:
    """Run; the exit code."""
    process.log_to_stderr()
    for noisy in ("uvicorn.error", "mcp"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

    async def begin() -> None:
        if missing := missing_modules():
            raise Unavailable(f"a sidecar needs {', '.join(missing)}, which is not installed: {INSTALL}")
        connection = load_settings(os.environ.get("WEFT_IDENTITY") or IDENTITY)
        await serve(connection, load_sidecar_config(connection), grace=process.grace())

    return process.run(IDENTITY, begin)


if __name__ == "__main__":
    sys.exit(main())
