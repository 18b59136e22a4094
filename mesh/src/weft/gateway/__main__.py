"""`python -m weft.gateway`: one gateway until SIGTERM or SIGINT.

Prints `ready` and its addresses on standard error when it serves. Exit code 0 when it was told to stop, else that of
the error.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path

from weft.core import process
from weft.core.config import CONFIG_NAME, ConnectionSettings, load_mesh_config, load_settings
from weft.core.gatewayconf import INSTALL, GatewayConfig, checked, from_environment, missing_modules
from weft_protocols.errors import InvalidConfig, Unavailable, WeftError

IDENTITY = "gateway"


def load_gateway_config(connection: ConnectionSettings) -> GatewayConfig:
    """Section `gateway` of `mesh.yaml`, with what the environment says instead.

    The file is that of `WEFT_CONFIG`, else that of the mesh's project folder or of the current one.

    Raises InvalidConfig.
    """
    named = os.environ.get("WEFT_CONFIG")
    folders = [*([connection.home.parent] if connection.home is not None else []), Path.cwd()]
    path = Path(named) if named else next((f / CONFIG_NAME for f in folders if (f / CONFIG_NAME).is_file()), None)
    config = load_mesh_config(path).gateway if path is not None else GatewayConfig()
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
            _say(f"ready: gateway at {service.http}/agents, gRPC at {service.grpc}{_warning(service.config)}")
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


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _grace() -> float:
    text = os.environ.get("WEFT_GRACE", "10")
    try:
        return max(0.0, float(text))
    except ValueError:
        raise InvalidConfig(f"WEFT_GRACE is {text!r}; it must be a number of seconds") from None


def main() -> int:
    """Run; the exit code."""
    process.log_to_stderr()
    for noisy in ("uvicorn.error", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # A client's malformed request is no news; what fails in here is logged by the handler, with its incident.
    logging.getLogger("a2a").setLevel(logging.CRITICAL)
    # The SDK's own spans cost more than what it does here, and have nothing of A2A in them.
    os.environ["OTEL_INSTRUMENTATION_A2A_SDK_ENABLED"] = "false"
    try:
        if missing := missing_modules():
            raise Unavailable(f"a gateway needs {', '.join(missing)}, which is not installed: {INSTALL}")
        connection = load_settings(os.environ.get("WEFT_IDENTITY") or IDENTITY)
        with asyncio.Runner(loop_factory=process.loop_factory()) as runner:
            runner.run(serve(connection, load_gateway_config(connection), grace=_grace()))
    except WeftError as error:
        _say(f"gateway: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
