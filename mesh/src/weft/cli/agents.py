"""`mesh agents`: who is there, what they can do, how busy they are."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import click

from weft.cli.assess import SERVING
from weft.cli.health import agent_record
from weft.cli.observe import Facts, gather
from weft.cli.output import Column, Printer, ago, output_option

COLUMNS: Final = (
    Column("name", "AGENT"),
    Column("version"),
    Column("skills", flexible=True),
    Column("ready", "REPLICAS", right=True),
    Column("active", right=True),
    Column("queue", right=True),
    Column("last_seen", show=ago, right=True),
)
COORDINATOR_DOWN: Final = 3


@click.command()
@output_option
def command(output: str) -> int:
    """List the agents: version, skills, replicas, tasks in work and waiting, last sign of life.

    Exit code 3 when the coordinator does not answer: then only the broker's part is known.
    """
    facts = asyncio.run(gather())
    printer = Printer(output)
    rows = [_row(facts, name) for name in facts.names]
    printer.rows(rows, COLUMNS, empty="no agents yet; `mesh run FILE` runs one, mesh.yaml keeps it")
    if facts.agents is None:
        printer.talk(f"mesh: the coordinator is down ({facts.silence}): versions, skills and replicas are not known")
        printer.talk("  next: mesh health")
        return COORDINATOR_DOWN
    return 0


def _row(facts: Facts, name: str) -> dict[str, Any]:
    """One agent. Its ready replicas are those that report, or where nobody listens, ready processes."""
    row = agent_record(facts, name)
    ready: int | None = None
    if row["replicas"] is not None:
        ready = sum(replica["state"] in SERVING for replica in row["replicas"])
    elif facts.processes is not None:
        ready = sum(process["agent"] == name and process["state"] == "ready" for process in facts.processes)
    return {**row, "ready": ready}
