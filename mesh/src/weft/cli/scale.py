"""`mesh scale`: more or fewer replicas of an agent."""

from __future__ import annotations

import click

from weft.cli.output import Printer
from weft.cli.restart import SILENCE


@click.command()
@click.argument("name")
@click.argument("replicas", type=click.IntRange(0, 1000))
def command(name: str, replicas: int) -> None:
    """Run REPLICAS replicas of agent NAME, or coordinators, until the mesh is stopped; mesh.yaml is not changed."""
    from weft.cli.supervisor.control import call
    from weft.core.config import find_home

    printer = Printer()
    left = call(find_home(), "scale", tell=printer.talk, timeout=SILENCE, name=name, replicas=replicas)
    printer.talk(f"{name} has {len(left)} replica{'' if len(left) == 1 else 's'}")
