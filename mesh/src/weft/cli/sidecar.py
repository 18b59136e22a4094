"""`mesh sidecar`: a sidecar in the foreground."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

MODULE = "weft.sidecar"


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), help="Port of the HTTP front; 0 for a free one.")
@click.option(
    "--presidio",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Presidio's configuration, for `redact: [presidio]`; without it, its patterns alone.",
)
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The mesh.yaml to read.")
def command(port: int | None, presidio: Path | None, config: Path | None) -> None:
    """Run a sidecar: the one way from agents to tool servers, until Ctrl-C.

    Any number of sidecars can serve one mesh; each request goes to one of them. Ctrl-C lets calls under way end.
    """
    import runpy

    from weft.core.config import load_settings
    from weft.core.toolsconf import INSTALL, missing_modules
    from weft_protocols.errors import Unavailable

    if missing := missing_modules():
        raise Unavailable(f"a sidecar needs {', '.join(missing)}, which is not installed: {INSTALL}")
    settings = load_settings("sidecar")
    os.environ["WEFT_IDENTITY"] = settings.identity
    if settings.home is not None:
        os.environ.setdefault("WEFT_HOME", str(settings.home))
    given = {"WEFT_SIDECAR_PORT": port, "WEFT_SIDECAR_PRESIDIO": presidio, "WEFT_CONFIG": config}
    os.environ.update({name: str(value) for name, value in given.items() if value is not None})
    sys.argv = [MODULE]
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
