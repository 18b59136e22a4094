"""`mesh gateway`: a gateway in the foreground."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

MODULE = "weft.gateway"


@click.command()
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="HTTP port; 0 for a free one.  [default: 8080 if free]")
@click.option("--grpc-port", type=click.IntRange(0, 65535), help="gRPC port, likewise.  [default: 50051 if free]")
@click.option("--public-url", help="How clients reach it, where that is another address.")
@click.option("--default-agent", help="The agent that requests which name none are for.")
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The mesh.yaml to read.")
def command(
    host: str | None,
    port: int | None,
    grpc_port: int | None,
    public_url: str | None,
    default_agent: str | None,
    config: Path | None,
) -> None:
    """Serve every agent of the mesh here over JSON-RPC, HTTP+JSON and gRPC, until Ctrl-C.

    Authentication, limits and the rest come from section `gateway` of mesh.yaml; options win over it. Any number
    of gateways can serve one mesh. Ctrl-C lets requests and streams under way end.
    """
    import runpy

    from weft.core.config import load_settings
    from weft.core.gatewayconf import INSTALL, missing_modules
    from weft_protocols.errors import Unavailable

    if missing := missing_modules():
        raise Unavailable(f"a gateway needs {', '.join(missing)}, which is not installed: {INSTALL}")
    settings = load_settings("gateway")
    os.environ["WEFT_IDENTITY"] = settings.identity
    if settings.home is not None:
        os.environ.setdefault("WEFT_HOME", str(settings.home))
    given = {
        "WEFT_GATEWAY_HOST": host,
        "WEFT_GATEWAY_PORT": port,
        "WEFT_GATEWAY_GRPC_PORT": grpc_port,
        "WEFT_GATEWAY_PUBLIC_URL": public_url,
        "WEFT_GATEWAY_DEFAULT_AGENT": default_agent,
        "WEFT_CONFIG": config,
    }
    os.environ.update({name: str(value) for name, value in given.items() if value is not None})
    sys.argv = [MODULE]
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
