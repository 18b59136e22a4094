"""`mesh coordinator`: run one in the foreground, see which one leads, make the read models anew."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from weft.cli.output import Column, Printer, ago, output_option, rfc3339

if TYPE_CHECKING:
    from weft.client.leadership import CoordinatorInfo

MODULE: Final = "weft_coordinator.service"
NOBODY_LEADS: Final = 3
COLUMNS: Final = (
    Column("coordinator"),
    Column("role", state=True),
    Column("pid", right=True),
    Column("up", show=ago, right=True),
    Column("epoch", right=True),
    Column("decided", right=True),
    Column("position", right=True),
    Column("lag", right=True),
)


@click.group(invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Run a coordinator for the mesh here, until Ctrl-C. The first one leads, others stand by.

    With a command: see which one leads, or make the read models anew.
    """
    if ctx.invoked_subcommand is None:
        _serve()


@command.command("run")
def run() -> None:
    """Run a coordinator until Ctrl-C, as `mesh coordinator` alone does."""
    _serve()


@command.command("status")
@output_option
def status(output: str) -> int:
    """Show the coordinators: which one leads since when, and how far each has read.

    EPOCH counts reigns, DECIDED is the last decision, POSITION and LAG are those of the read model in messages of
    the task stream. Exit code 3 when none leads.
    """
    from weft.cli.operate import as_operator
    from weft.client import leadership

    found = as_operator(leadership.coordinators, name="mesh coordinator status")
    leader = next((one for one in found if one.role == "leader"), None)
    printer = Printer(output)
    rows = [_row(one) for one in found]
    if printer.machine:
        printer.record(
            {
                "leader": leader.id if leader is not None else None,
                "epoch": max(one.epoch for one in found),
                "since": rfc3339(leader.since / 1000) if leader is not None else None,
                "decided": max(one.decided for one in found),
                "coordinators": rows,
            }
        )
    else:
        printer.rows(rows, COLUMNS)
    if leader is None:
        printer.talk("mesh: no coordinator leads: locks, wake-ups and timers wait until one does")
        printer.talk("  next: mesh logs coordinator")
        return NOBODY_LEADS
    if not printer.machine:
        printer.talk(f"{leader.id} leads since {rfc3339(leader.since / 1000)}, in epoch {leader.epoch}")
    return 0


@command.command("rebuild")
@output_option
def rebuild(output: str) -> None:
    """Make the read models of all coordinators anew from the broker's log. They answer from the old ones meanwhile."""
    from weft.cli.operate import as_operator
    from weft.client import leadership

    told = as_operator(leadership.rebuild, name="mesh coordinator rebuild")
    many = told.get("coordinators", 1)
    begun = "has begun" if told.get("started") else "was under way already"
    text = f"the rebuild {begun} on {many} coordinator{'' if many == 1 else 's'}"
    Printer(output).record(told, text=f"{text}; `mesh coordinator status` shows how far it is")


def _row(one: CoordinatorInfo) -> dict[str, Any]:
    from weft.cli.operate import age

    return {
        "coordinator": one.id,
        "role": one.role,
        "host": one.host,
        "pid": one.pid,
        "started": rfc3339(one.started / 1000),
        "up": age(one.started),
        "epoch": one.epoch,
        "decided": one.decided,
        "position": one.projection.get("position"),
        "lag": one.projection.get("lag"),
        "projection": dict(one.projection),
    }


def _serve() -> None:
    import runpy

    from weft.core.config import load_settings

    settings = load_settings("coordinator")
    os.environ["WEFT_IDENTITY"] = settings.identity
    if settings.home is not None:
        os.environ.setdefault("WEFT_HOME", str(settings.home))
    sys.argv = [MODULE]
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
