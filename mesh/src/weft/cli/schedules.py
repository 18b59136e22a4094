"""`mesh schedules`: what starts by the clock, when it last did and will next."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

import click

from weft.cli.output import Column, Printer, ago, output_option, rfc3339

COLUMNS: Final = (
    Column("name", "SCHEDULE"),
    Column("agent"),
    Column("cron"),
    Column("timezone"),
    Column("next"),
    Column("last"),
    Column("message", flexible=True),
)


@click.command()
@output_option
def command(*, output: str) -> None:
    """List the schedules of mesh.yaml as the coordinator has them: when each is due next, and was last started.

    Exit code 7 when no coordinator answers.
    """
    told = asyncio.run(_told())
    printer = Printer(output)
    rows = [{**one, **_times(one, machine=printer.machine)} for one in told]
    printer.rows(rows, COLUMNS, empty="no schedules; mesh.yaml takes them under `schedules`")


async def _told() -> list[dict[str, Any]]:
    from weft.client import coordinator
    from weft.core.broker import Broker
    from weft.core.config import load_settings
    from weft_protocols.subjects import OPERATOR

    broker = await Broker.connect(load_settings(OPERATOR), name="mesh schedules")
    try:
        return list(await coordinator.schedules(broker))
    finally:
        await broker.close()


def _times(one: dict[str, Any], *, machine: bool) -> dict[str, Any]:
    """Its times as text: exact for a program and for what is to come, how long ago for people."""
    next_, last = one["next"] / 1000, one["last"] / 1000
    shown = rfc3339(last) if machine else f"{ago(time.time() - last)} ago"
    return {
        "next": rfc3339(next_) if next_ else "",
        "last": shown if last else "",
        "since": rfc3339(one["since"] / 1000),
    }
