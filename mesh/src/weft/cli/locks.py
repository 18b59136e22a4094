"""`mesh locks`: who holds which lock, who waits for whom, and taking a lock away."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from weft.cli.output import Column, Printer, ago, output_option, rfc3339

if TYPE_CHECKING:
    from weft.client.locks import Holding, LockInfo, WaitGraph
    from weft.core.broker import Broker

SHOWN: Final = 3
"""Past deadlocks in the text."""
COLUMNS: Final = (
    Column("name", "LOCK", flexible=True),
    Column("mode"),
    Column("held_by", flexible=True),
    Column("held_for", show=ago, right=True),
    Column("token", right=True),
    Column("waiting", right=True),
    Column("next", flexible=True),
    Column("waits_for", show=ago, right=True),
)


@click.group()
def command() -> None:
    """List the locks, show who waits for whom, take a lock away."""


@command.command("list")
@output_option
def list_locks(output: str) -> None:
    """List every lock that is held or waited for: by whom, for how long, and who is next."""
    from weft.cli.operate import as_operator
    from weft.client import locks

    found, total = as_operator(locks.locks, name="mesh locks")
    printer = Printer(output)
    rows = [_record(one) if printer.machine else _row(one) for one in found]
    printer.rows(rows, COLUMNS, empty="no lock is held")
    if total > len(found):
        printer.talk(f"these are {len(found)} of {total} locks")


@command.command()
@click.option(
    "--svg",
    "picture",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Draw it into this SVG file; - for standard output.",
)
@click.option("--last", is_flag=True, help="The last deadlock that was broken, instead of what waits now.")
@output_option
def graph(picture: Path | None, *, last: bool, output: str) -> None:
    """Show who waits for whom: for a lock, a child, the turn in a conversation, or a person's approval.

    Tasks that wait for each other are marked as a circle. The coordinator breaks one as soon as it closes, so one
    that is shown either is being broken or may still come loose by itself. Below are the last that were broken.
    """
    import time

    from weft.cli import waitgraph
    from weft.cli.errors import NotFound
    from weft.cli.operate import as_operator
    from weft.client import locks

    async def work(broker: Broker) -> tuple[WaitGraph, tuple[LockInfo, ...]]:
        known, _ = await locks.locks(broker)
        return (await locks.graph(broker)).named(known), known

    found, known = as_operator(work, name="mesh locks graph")
    if last:
        if not found.last:
            raise NotFound("no deadlock was broken yet")
        found, known = found.last[-1].graph, ()
    printer = Printer(output)
    if picture is not None:
        _draw(found, known, picture, printer)
        return
    knots = waitgraph.circles(found)
    shown = [waitgraph.text(found), waitgraph.history(found.last[-SHOWN:], now=time.time())]
    if not found.edges and not printer.machine:
        printer.talk("nobody waits for anybody")
        if not found.last:
            return
    printer.record(
        {
            "tasks": [{"task": task, "agent": agent} for task, agent in sorted(found.agents.items())],
            "waits": [asdict(edge) for edge in found.edges],
            "circles": [[asdict(edge) for edge in knot] for knot in knots],
            "deadlocks": {"count": found.deadlocks, "last": [asdict(one) for one in found.last]},
        },
        text="\n\n".join(part for part in shown if part),
    )
    if found.waiting > (waiting := len({edge.task for edge in found.edges})):
        printer.talk(f"these are {waiting} of {found.waiting} tasks that wait")


@command.command()
@click.argument("name")
@click.option("--reason", required=True, help="Why; the log and who held it see it.")
@click.option("--task", default="", help="Only from this task (the beginning of its id will do), not from all holders.")
@output_option
def release(name: str, reason: str, *, task: str, output: str) -> None:
    """Take lock NAME from who holds it. What they still do under it is refused by its old token."""
    from weft.cli.operate import as_operator, short
    from weft.client import locks

    if not reason.strip():
        raise click.UsageError("--reason is empty; say why the lock is taken away")

    async def work(broker: Broker) -> tuple[Holding, ...]:
        known, total = await locks.locks(broker)
        held = {one.name: one for one in known}
        # Of very many locks not all are listed: then the coordinator alone knows.
        chosen = _holder(held, name, task) if name in held or total == len(known) else task
        return await locks.release(broker, name, reason=reason, task=chosen)

    gone = as_operator(work, name="mesh locks release")
    who = ", ".join(f"{one.agent} {short(one.task)}" for one in gone) or "nobody: it was free by then"
    record = {"name": name, "released": [_holding(one) for one in gone], "reason": reason}
    Printer(output).record(record, text=f"{name} was taken from {who}")


def _holder(held: dict[str, LockInfo], name: str, task: str) -> str:
    """Id of the holder whose id begins so, empty for all; NotFound says what is held instead."""
    from weft.cli.errors import NotFound
    from weft.cli.operate import short
    from weft.core.config import did_you_mean

    lock = held.get(name)
    if lock is None or not lock.holders:
        known = [one.name for one in held.values() if one.holders]
        shown = f"; held are {', '.join(known[:20])}{' and others' if len(known) > 20 else ''}" if known else ""
        raise NotFound(f"nobody holds lock {name!r}{did_you_mean(name, known)}{shown or '; no lock is held'}")
    if not task:
        return ""
    found = [one.task for one in lock.holders if one.task.startswith(task)]
    if len(found) != 1:
        holders = ", ".join(f"{one.agent} {short(one.task)}" for one in lock.holders)
        what = "no task" if not found else f"{len(found)} tasks"
        raise NotFound(f"lock {name!r} is held by {what} whose id begins with {task!r}; by {holders}")
    return found[0]


def _draw(found: WaitGraph, known: tuple[LockInfo, ...], picture: Path, printer: Printer) -> None:
    from weft.cli import drawing, waitgraph

    boxes, arrows = waitgraph.picture(found, known)
    text = drawing.svg(boxes, arrows, title="Who waits for whom")
    if str(picture) == "-":
        click.echo(text, nl=False)
        return
    picture.write_text(text, encoding="utf-8")
    printer.talk(f"wrote {picture}: {len(boxes)} boxes, {len(arrows)} arrows")


def _row(lock: LockInfo) -> dict[str, Any]:
    """A lock as a line of the table."""
    from weft.cli.operate import age, short

    first, following = next(iter(lock.holders), None), next(iter(lock.waiters), None)
    return {
        "name": lock.name,
        "mode": lock.mode,
        "held_by": [f"{one.agent} {short(one.task)}" for one in lock.holders],
        "held_for": age(first.since) if first is not None else None,
        "token": first.token if first is not None else None,
        "waiting": lock.waiting,
        "next": f"{following.agent} {short(following.task)}" if following is not None else None,
        "waits_for": age(following.since) if following is not None else None,
    }


def _record(lock: LockInfo) -> dict[str, Any]:
    return {
        "name": lock.name,
        "mode": lock.mode,
        "holders": [{**_holding(one), "token": one.token} for one in lock.holders],
        "waiting": lock.waiting,
        "waiters": [{**_holding(one), "mode": one.mode} for one in lock.waiters],
    }


def _holding(one: Holding) -> dict[str, Any]:
    since = rfc3339(one.since / 1000) if one.since else None
    return {"agent": one.agent, "task": one.task, "replica": one.replica, "since": since}
