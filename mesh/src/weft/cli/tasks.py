"""`mesh tasks`: list, show, watch and cancel tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from weft.cli.output import Column, Printer, output_option, safe

if TYPE_CHECKING:
    from weft.client.mesh import Mesh
    from weft.client.watch import Event

T = TypeVar("T")

STATES: Final = (
    "submitted", "working", "input-required", "auth-required", "completed", "failed", "canceled", "rejected",
)  # fmt: skip
PAGE: Final = 100
COLUMNS: Final = (
    Column("id", "TASK"),
    Column("agent"),
    Column("state", state=True),
    Column("updated", show=lambda value: f"{value[:19]}Z" if value else "-"),
    Column("text", flexible=True),
)


@click.group()
def command() -> None:
    """List, show, watch and cancel tasks; show what they delegated."""


def _all_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--all", "everybody", is_flag=True, help="Tasks of every caller, as the operator.")(function)


@command.command("list")
@click.option("--agent", help="Only tasks of this agent.")
@click.option("--state", type=click.Choice(STATES), help="Only tasks in this state.")
@click.option("--context", help="Only tasks of this conversation.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many.")
@_all_option
@output_option
def list_tasks(
    agent: str | None, state: str | None, *, context: str | None, limit: int, everybody: bool, output: str
) -> None:
    """List tasks, the one that changed last first."""
    from weft.cli import taskview
    from weft_protocols.parts import TaskView
    from weft_protocols.states import BY_LABEL

    async def work(mesh: Mesh) -> list[TaskView]:
        found: list[TaskView] = []
        token = ""
        while len(found) < limit:
            page = await mesh.list(
                agent,
                state=BY_LABEL[state] if state else None,
                context_id=context,
                page_size=min(PAGE, limit - len(found)),
                page_token=token,
            )
            found += page.tasks
            token = page.next_page_token
            if not token:
                break
        return found

    rows = [
        {**taskview.record(view, contents=False), "text": taskview.explanation(view)}
        for view in _run(work, everybody=everybody)
    ]
    Printer(output).rows(rows, COLUMNS, empty="no tasks")


@command.command()
@click.argument("task_id", metavar="TASK")
@click.option("--agent", default="", help="The task's agent, which saves looking for it.")
@_all_option
@output_option
def get(task_id: str, agent: str, *, everybody: bool, output: str) -> None:
    """Show task TASK with its messages and results."""
    from weft.cli import taskview

    view = _run(lambda mesh: mesh.get(agent or _any(), task_id), everybody=everybody)
    head = {
        "task": view.id,
        "agent": view.agent,
        "state": view.state.label,
        "context": view.context_id,
        "updated": view.updated,
        "message": taskview.explanation(view),
    }
    lines = [f"{key + ':':<9} {safe(value)}" for key, value in head.items() if value]
    for artifact in view.artifacts:
        lines += ["", f"{artifact.name or artifact.id}:"]
        lines += [safe(taskview.part_text(part)) for part in artifact.parts]
    Printer(output).record(taskview.record(view), text="\n".join(lines))


@command.command()
@click.argument("task_id", metavar="TASK")
@click.option("--agent", default="", help="The task's agent, which saves looking for it.")
@click.option("--after", type=click.IntRange(min=0), default=0, help="Begin after event number N.", metavar="N")
@output_option
def watch(task_id: str, agent: str, *, after: int, output: str) -> None:
    """Print the events of task TASK until it ends or waits for input. Exit code 1 when it failed."""
    from weft.cli.conversation import event_record

    printer = Printer("jsonl" if output == "json" else output)

    async def work(mesh: Mesh) -> int:
        view = await mesh.get(agent or _any(), task_id, history_length=0)
        seen, state = after, None
        while True:
            async for event in mesh.subscribe(view.agent, task_id, after=seen):
                seen, state = event.n, event.state or state
                printer.item(event_record(event), text=_event_line(event))
            # The events stop at a question; one that was answered is not the end of them.
            if state is None or not state.interrupted or view.events <= seen:
                return int(state is not None and state.terminal and state.label != "completed")

    raise click.exceptions.Exit(_run(work))


@command.command()
@click.argument("task_id", metavar="TASK")
@click.option("--agent", default="", help="The task's agent, which saves looking for it.")
@click.option("--reason", default="", help="Why; the agent and the log see it.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds to wait until it has ended.",
)
@output_option
def cancel(task_id: str, agent: str, *, reason: str, timeout: float, output: str) -> None:
    """Cancel task TASK and, through it, everything it delegated."""
    from weft.cli import taskview

    async def work(mesh: Mesh) -> Any:
        name = agent or (await mesh.get(_any(), task_id, history_length=0)).agent
        return await mesh.cancel(name, task_id, reason=reason, timeout=timeout)

    view = _run(work)
    Printer(output).record(taskview.record(view), text=f"{view.id} {view.state.label}")


@command.command("tree")
@click.argument("task_id", metavar="TASK")
@_all_option
@output_option
def tree(task_id: str, *, everybody: bool, output: str) -> None:
    """Show the tree TASK is part of: who delegated what to whom, and how far each of them is.

    It begins with the highest task the caller may see; with --all, with the task somebody outside sent.
    """
    import time

    from weft.cli import treeview
    from weft.client import trees

    found = _run(lambda mesh: trees.tree(mesh.broker, task_id), everybody=everybody)
    printer = Printer(output)
    if printer.machine:
        printer.record({"root": treeview.nested(found), "more": found.more})
        return
    printer.rows(treeview.rows(found, now=time.time()), treeview.COLUMNS)
    if found.more:
        printer.talk(f"there are more than these {len(found.nodes)} tasks")


def _event_line(event: Event) -> str:
    label = "" if event.state is None else event.state.label
    if event.artifact is not None:
        label = f"artifact {event.artifact.name or event.artifact.id}"
    return safe(f"{event.n:>4}  {label:<15} {' '.join(event.text.split())}".rstrip())


def _any() -> str:
    """The agent token of an operation that looks for its task."""
    from weft.client.reads import ANY_AGENT

    return ANY_AGENT


def _run(work: Callable[[Mesh], Awaitable[T]], *, everybody: bool = False) -> T:
    """Run `work` with a connection, as the caller or as the operator."""
    from weft.client.mesh import connect
    from weft_protocols.subjects import OPERATOR

    async def connected() -> T:
        async with connect(OPERATOR if everybody else None) as mesh:
            return await work(mesh)

    return asyncio.run(connected())
