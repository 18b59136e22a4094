"""`mesh down`: drain the agents and stop everything."""

from __future__ import annotations

import click

from weft.cli.output import Printer


@click.command()
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=120.0,
    show_default=True,
    help="Seconds to wait for the agents to finish.",
)
def command(timeout: float) -> None:
    """Drain the agents, then stop the coordinator and the broker. Accepted tasks are kept."""
    from weft.cli.supervisor.control import call
    from weft.cli.supervisor.state import Record, clear_stale
    from weft.core.config import find_home
    from weft_protocols.errors import DeadlineExceeded, Unavailable

    printer = Printer()
    home = find_home()
    record = Record.read(home)
    if record is None or not record.alive:
        clear_stale(home)
        printer.talk(f"the mesh in {home.parent} is not running")
        return
    printer.progress("draining the agents and stopping")
    try:
        call(home, "stop", timeout=timeout)
    except Unavailable:
        if record.alive:
            raise
    if not record.ends(timeout):
        raise DeadlineExceeded(f"the supervisor (pid {record.pid}) has not ended within {timeout:g} s")
    printer.talk(f"the mesh in {home.parent} is down")
