"""`mesh restart`: apply changes without an interruption."""

from __future__ import annotations

import click

from weft.cli.output import Printer

SILENCE = 180.0
"""Seconds one replica may take to start and another to drain."""


@click.command()
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """Restart NAME: an agent, one replica such as hello.2, the gateway, the coordinator or the broker.

    mesh.yaml is read again. An agent's replicas are replaced one after the other: the new one has to be ready
    before the old one is drained. Without NAME everything but the broker is restarted; agents that are new in
    mesh.yaml are started, agents that are gone from it are drained.
    """
    from weft.cli.supervisor.control import call
    from weft.core.config import find_home

    printer = Printer()
    done = call(find_home(), "restart", tell=printer.talk, timeout=SILENCE, name=name)
    printer.talk(f"restarted: {', '.join(done) or 'nothing to restart'}")
