"""`mesh ps`: the processes of the mesh."""

from __future__ import annotations

import time
from typing import Any, Final

import click

from weft.cli.output import Column, Printer, ago, output_option, rfc3339

COLUMNS: Final = (
    Column("name"),
    Column("kind"),
    Column("state", state=True),
    Column("pid", right=True),
    Column("restarts", right=True),
    Column("uptime", show=ago, right=True),
    Column("since", show=lambda value: f"{value[11:19]}Z" if value else "-"),
    Column("reason", flexible=True),
)


@click.command()
@output_option
def command(output: str) -> None:
    """List the processes of the mesh: what they are, whether they are ready, and why not."""
    from weft.cli.supervisor.control import call
    from weft.core.config import find_home

    now = time.time()
    rows = [_shown(row, now) for row in call(find_home(), "ps")]
    Printer(output).rows(rows, COLUMNS)


def _shown(row: dict[str, Any], now: float) -> dict[str, Any]:
    """A supervisor's row with times that people and programs read: RFC 3339 and seconds."""
    started = row["started"]
    return {
        **row,
        "since": rfc3339(row["since"]),
        "started": None if started is None else rfc3339(started),
        "uptime": None if started is None else round(max(0.0, now - started), 3),
    }
