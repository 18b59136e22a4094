"""`mesh incidents`: what the coordinator's watchdog found."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

import click

from weft.cli.operate import ListingGroup, as_operator
from weft.cli.output import Column, Printer, ago, output_option, rfc3339, safe

if TYPE_CHECKING:
    from weft.client.incidents import Incident, Watch
    from weft.core.broker import Broker

CHECK_FAILED: Final = 3
"""Exit code when a critical incident is open and `--check` was given."""
COLUMNS: Final = (
    Column("id", right=True),
    Column("severity", state=True),
    Column("state"),
    Column("age", show=ago, right=True),
    Column("title", flexible=True),
    Column("command", "NEXT", flexible=True),
)
EVERY: Final = 2.0
"""Seconds between looks with `--watch`."""


@click.group(cls=ListingGroup)
def command(**_: Any) -> None:
    """List what is wrong in the mesh: since when, why, and the command to run next.

    Without a command it is `list`. Incidents open and clear by themselves; mesh.yaml sets what counts as one.
    """


@command.command("list")
@click.option("--all", "everything", is_flag=True, help="The cleared ones too.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True, help="At most so many.")
@click.option("--watch", is_flag=True, help="Then print every change, until Ctrl-C.")
@click.option("--check", is_flag=True, help="Exit code 3 while a critical incident is open.")
@output_option
def list_incidents(everything: bool, limit: int, *, watch: bool, check: bool, output: str) -> int:
    """List open incidents, the last one first."""
    printer = Printer("jsonl" if watch and output == "json" else output)
    if watch:
        as_operator(lambda broker: _follow(broker, printer), name="mesh incidents")
    seen = as_operator(lambda broker: _read(broker, everything=everything, limit=limit), name="mesh incidents")
    rows = [record(one) for one in seen.incidents]
    printer.rows(rows, COLUMNS, empty="no open incidents" if not everything else "no incidents")
    _talk(printer, seen)
    critical = any(one.state == "open" and one.severity == "critical" for one in seen.incidents)
    return CHECK_FAILED if check and critical else 0


# For the help and for completion: options without a command are those of the list.
command.params += [one for one in list_incidents.params if isinstance(one, click.Option)]


@command.command()
@click.argument("incident_id", metavar="ID", type=click.IntRange(min=1))
@output_option
def show(incident_id: int, output: str) -> None:
    """Show incident ID: its cause, the tasks it is about, who was told, and the command to run next."""
    from weft.cli.errors import NotFound
    from weft.client import incidents
    from weft_protocols.errors import InvalidParams

    try:
        one = as_operator(lambda broker: incidents.incident(broker, incident_id), name="mesh incidents")
    except InvalidParams as error:
        raise NotFound(error.message) from error
    told = record(one)
    lines = [
        f"incident {one.id}, {one.severity}, {one.state}: {one.title}",
        f"  {one.cause}",
        f"  opened {told['opened']}, last seen {told['last_seen']}"
        + (f", cleared {told['cleared']}" if one.cleared else ""),
    ]
    if one.tasks:
        more = f" and {one.count - len(one.tasks)} more" if one.count > len(one.tasks) else ""
        lines.append(f"  tasks: {', '.join(one.tasks)}{more}")
    lines += [f"  told: {target}: {said[1]} ({said[0]})" for target, said in one.told.items()]
    lines.append(f"  next: {one.command}")
    Printer(output).record(told, text="\n".join(safe(line) for line in lines))


def record(one: Incident) -> dict[str, Any]:
    """An incident as JSON values: times are RFC 3339 or null, the age is seconds."""
    return {
        "id": one.id,
        "key": one.key,
        "severity": one.severity,
        "state": one.state,
        "title": one.title,
        "cause": one.cause,
        "command": one.command,
        "agents": list(one.agents),
        "tasks": list(one.tasks),
        "count": one.count,
        "opened": rfc3339(one.opened / 1000),
        "last_seen": rfc3339(one.last_seen / 1000),
        "cleared": rfc3339(one.cleared / 1000) if one.cleared else None,
        "age": round(max(0.0, (one.cleared or time.time() * 1000) - one.opened) / 1000, 1),
        "told": {target: list(said) for target, said in one.told.items()},
    }


async def _read(broker: Broker, *, everything: bool, limit: int) -> Watch:
    from weft.client import incidents

    return await incidents.incidents(broker, everything=everything, limit=limit)


async def _follow(broker: Broker, printer: Printer) -> None:
    """Print incidents as they open, change and clear."""
    known: dict[int, tuple[str, str]] = {}
    first = True
    while True:
        seen = await _read(broker, everything=True, limit=1000)
        for one in reversed(seen.incidents):
            now = (one.state, one.severity)
            if known.get(one.id) != now and not (first and one.state == "cleared"):
                text = f"{one.severity} incident {one.id} {one.state}: {one.title}"
                printer.item(record(one), text=safe(text if one.cleared else f"{text}; next: {one.command}"))
            known[one.id] = now
        first = False
        await asyncio.sleep(EVERY)


def _talk(printer: Printer, seen: Watch) -> None:
    if len(seen.incidents) < seen.total:
        printer.talk(f"{seen.total - len(seen.incidents)} more; see --limit")
    if not seen.watching:
        printer.talk("mesh: the watchdog is off (mesh.yaml, watchdog.enabled): nothing opens or clears")
    for target in seen.alerts:
        if target["problem"]:
            printer.talk(f"mesh: {target['target']} was not told: {target['problem']}")


__all__ = ["command", "record"]
