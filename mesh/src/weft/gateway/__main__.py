"""`python -m weft.gateway`: one gateway until SIGTERM or SIGINT.

Prints `ready` and its addresses on standard error when it serves. Exit code 0 when it was told to stop, else that of
the error.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from weft.core import process
from weft.core.config import ConnectionSettings, load_settings, own_mesh_config
from weft.core.gatewayconf import INSTALL, GatewayConfig, checked, from_environment, missing_modules
from weft_protocols.errors import Unavailable

IDENTITY = "gateway"


def load_gateway_config(connection: ConnectionSettings) -> GatewayConfig:
    """Section `gateway` of `mesh.yaml`, with what the environment says instead.

    Raises InvalidConfig.
    """
    found = own_mesh_config(connection)
    config = found.gateway if found is not None else GatewayConfig()
    return checked(from_environment(config))


async def serve(connection: ConnectionSettings, config: GatewayConfig, *, grace: float) -> None:
    """Connect, serve until a signal, drain."""
    from weft.core.broker import Broker
    from weft.core.home import Home
    from weft.gateway.service import GatewayService

    stop = asyncio.Event()
    process.leave_when_told(stop.set)
    broker = await Broker.connect(connection, name=IDENTITY, timeout=15.0)
    try:
        home = Home(connection.home) if connection.home is not None else None
        service = GatewayService(broker, config, home=home)
        try:
            await service.start()
            process.say(f"ready: gateway at {service.http}/agents, gRPC at {service.grpc}{_warning(service.config)}")
            process.collect_seldom()
            await service.run(stop)
            await service.drain(grace)
        finally:
            await service.aclose()
    finally:
        await broker.close()


def _warning(config: GatewayConfig) -> str:
    """Unauthenticated callers are said aloud."""
    if config.auth.anonymous is None:
        return ""
    return f"; callers without credentials are {config.auth.anonymous!r}, from this machine only"


def main() -> int:
    """Run; the exit code."""
    process.log_to_stderr()
    for noisy in ("uvicorn.error", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # A client's malformed request is no news; what fails in here is logged by the handler, with its incident.
    logging.getLogger("a2a").setLevel(logging.CRITICAL)
    # The SDK's own spans cost more than what it does here, and have nothing of A2A in them.
    os.environ["OTEL_INSTRUMENTATION_A2A_SDK_ENABLED"] = "false"

    async def begin() -> None:
        if missing := missing_modules():
            raise Unavailable(f"a gateway needs {', '.join(missing)}, which is not installed: {INSTALL}")
        connection = load_settings(os.environ.get("WEFT_IDENTITY") or IDENTITY)
        await serve(connection, load_gateway_config(connection), grace=process.grace())

    return process.run(IDENTITY, begin)


if __name__ == "__main__":
    sys.exit(main())
