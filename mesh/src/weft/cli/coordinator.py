"""`mesh coordinator`: a coordinator in the foreground."""

from __future__ import annotations

import os
import sys

import click

MODULE = "weft_coordinator.service"


@click.command()
def command() -> None:
    """Run a coordinator for the mesh here, until Ctrl-C. The first one leads, others stand by."""
    import runpy

    from weft.core.config import load_settings

    settings = load_settings("coordinator")
    os.environ["WEFT_IDENTITY"] = settings.identity
    if settings.home is not None:
        os.environ.setdefault("WEFT_HOME", str(settings.home))
    sys.argv = [MODULE]
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
