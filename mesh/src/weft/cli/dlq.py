"""`mesh dlq`: dead letters, the tasks that were given up, and what to do about them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import click

from weft.cli.operate import ListingGroup, Since, as_operator, sure
from weft.cli.output import Column, Printer, output_option, rfc3339, safe

if TYPE_CHECKING:
    from weft.client.coordinator import DeadLetterInfo
    from weft.client.letters import Redrive, Redriven, Which
    from weft.core.broker import Broker

NAME: Final = "mesh dlq"
PAGE: Final = 500
LOOK: Final = 0.5
"""Seconds between looks at a redrive that is followed."""
COLUMNS: Final = (
    Column("task"),
    Column("agent"),
    Column("state"),
    Column("time", show=lambda value: f"{value[:19]}Z"),
    Column("attempts", right=True),
    Column("reason", flexible=True),
)
SENT_COLUMNS: Final = (Column("task"), Column("redriven_as"), Column("n", "TIME", right=True), Column("repeated"))
JOB_COLUMNS: Final = (
    Column("job", right=True),
    Column("state", state=True),
    Column("agent"),
    Column("reason", "MATCHING", flexible=True),
    Column("redriven", right=True),
    Column("failed", right=True),
    Column("rate", right=True),
    Column("started", show=lambda value: f"{value[:19]}Z"),
)


@click.group(cls=ListingGroup)
def command(**_: Any) -> None:
    """Inspect dead letters, send their messages anew, or discard them.

    A task that failed after its attempts leaves a dead letter. Without a command it is `list`.
    """


def _which(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which letters are meant."""
    for option in (
        click.option("--since", type=Since(), default=0, help="Only since then: 15m, 2h, 7d or a time."),
        click.option("--matching", default="", help="Only with this text in the reason or the error.", metavar="TEXT"),
        click.option("--agent", default="", help="Only of this agent."),
    ):
        function = option(function)
    return function


@command.command("list")
@_which
@click.option(
    "--state",
    type=click.Choice(("open", "redriven", "discarded", "all")),
    default="open",
    show_default=True,
    help="Open: nobody has decided about it.",
)
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many.")
@output_option
def list_letters(agent: str, matching: str, since: int, *, state: str, limit: int, output: str) -> None:
    """List dead letters, the newest first."""
    from weft.client import letters

    async def work(broker: Broker) -> tuple[list[DeadLetterInfo], int]:
        which, wanted = letters.Which(agent, matching, since), "" if state == "all" else state
        found: list[DeadLetterInfo] = []
        after = 0
        while True:
            page = await letters.letters(broker, which, state=wanted, limit=min(PAGE, limit - len(found)), after=after)
            found += page.letters
            after = page.next
            if not after or len(found) >= limit:
                return found, page.total

    found, total = as_operator(work, name=NAME)
    printer = Printer(output)
    printer.rows([_record(one) for one in found], COLUMNS, empty="no dead letters")
    if len(found) < total:
        printer.talk(f"{total - len(found)} more; see --limit")


# For the help and for completion: options without a command are those of the list.
command.params += [one for one in list_letters.params if isinstance(one, click.Option)]


@command.command()
@click.argument("task")
@output_option
def show(task: str, output: str) -> None:
    """Show the dead letter of TASK: why it was given up, its message and its last events."""
    from weft.client import letters

    told = as_operator(lambda broker: letters.letter(broker, task), name=NAME)
    told["time"] = rfc3339(told["time"] / 1000)
    head = ("task", "agent", "caller", "context", "state", "time", "reason", "error", "attempts", "replica", "version")
    lines = [f"{name + ':':<10} {told[name]}" for name in head if told.get(name)]
    if told["redriven_as"]:
        lines.append(f"{'redriven:':<10} as {told['redriven_as']} ({told['redrives']} times)")
    if told["discarded_because"]:
        lines.append(f"{'discarded:':<10} {told['discarded_because']}")
    if told["chain"]:
        lines.append(f"{'chain:':<10} {' > '.join(told['chain'])}")
    lines += ["", "message:", *(f"  {_part(part)}" for part in told["parts"])]
    if told.get("unreadable"):
        lines.append(f"  {told['unreadable']}")
    lines += ["", "last events:"]
    lines += [f"  {event['n']:>4}  {event['state'] or 'artifact':<15} {event['text']}" for event in told["events"]]
    if told["state"] == "open":
        lines += ["", f"next: mesh dlq redrive {task}, or mesh dlq discard {task} --reason ..."]
    Printer(output).record(told, text="\n".join(safe(line) for line in lines))


@command.command()
@click.argument("tasks", nargs=-1, metavar="[TASK]...")
@_which
@click.option("--all", "everything", is_flag=True, help="Every open one.")
@click.option("--again", is_flag=True, help="Also what was redriven or discarded before.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=100_000, help="At most so many.", metavar="N")
@click.option("--rate", type=click.FloatRange(0.01, 1000), default=10.0, show_default=True, help="Letters a second.")
@click.option("--detach", is_flag=True, help="Do not wait until all are sent.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_option
def redrive(
    tasks: tuple[str, ...], *, again: bool, rate: float, detach: bool, yes: bool, output: str, **which: Any
) -> int:
    """Send the messages of dead letters anew, as their callers: of each TASK, or of all open ones that fit.

    Each is a task of its own, in the same conversation, without the deadline of the first. Repeating the command sends
    nothing twice. Exit code 1 when one could not be sent.
    """
    printer = Printer(output)
    if tasks:
        _either(which)
        sent = as_operator(lambda broker: _send(broker, tasks, again=again, rate=rate), name=NAME)
        if isinstance(sent, list):
            printer.rows(sent, SENT_COLUMNS)
            return 0
        job = sent
    else:
        if again:
            raise click.UsageError("--again is for single letters: name their tasks")
        chosen = _chosen(which)
        count = as_operator(lambda broker: _count(broker, chosen), name=NAME)
        if not count:
            printer.rows([], SENT_COLUMNS, empty="no dead letters fit")
            return 0
        sure(f"Redrive {min(count, which['limit'])} dead letters{_words(chosen)}?", yes=yes)
        job = as_operator(lambda broker: _start(broker, chosen, limit=which["limit"], rate=rate), name=NAME)
    if not detach:
        job = as_operator(lambda broker: _follow(broker, job, printer), name=NAME)
    printer.record(_job(job), text=_job_line(job))
    return 1 if job.failed else 0


@command.command()
@click.argument("tasks", nargs=-1, metavar="[TASK]...")
@_which
@click.option("--all", "everything", is_flag=True, help="Every open one.")
@click.option("--reason", required=True, help="Why nothing is done about them; it is recorded.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_option
def discard(tasks: tuple[str, ...], *, reason: str, yes: bool, output: str, **which: Any) -> None:
    """Decide that nothing is done about dead letters: of each TASK, or all open ones that fit."""
    from weft.client import letters

    printer = Printer(output)
    if tasks:
        _either(which)
        count = as_operator(lambda broker: letters.discard(broker, tasks, reason=reason), name=NAME)
    else:
        chosen = _chosen(which)
        count = as_operator(lambda broker: _count(broker, chosen), name=NAME)
        if count:
            sure(f"Discard {count} dead letters{_words(chosen)}?", yes=yes)
            count = as_operator(lambda broker: letters.discard(broker, which=chosen, reason=reason), name=NAME)
    printer.record({"discarded": count}, text=f"{count} discarded")


@command.command()
@output_option
def jobs(output: str) -> None:
    """List redrives of many letters: what runs, and what ended last."""
    from weft.client import letters

    found = as_operator(letters.redrives, name=NAME)
    Printer(output).rows([_job(one) for one in found], JOB_COLUMNS, empty="no redrives")


@command.command()
@click.argument("job", type=click.IntRange(min=1))
@output_option
def stop(job: int, output: str) -> None:
    """Stop the redrive JOB; what it sent stays sent."""
    from weft.client import letters

    stopped = as_operator(lambda broker: letters.stop(broker, job), name=NAME)
    Printer(output).record(_job(stopped), text=_job_line(stopped))


async def _send(broker: Broker, tasks: tuple[str, ...], *, again: bool, rate: float) -> list[dict[str, Any]] | Redrive:
    from weft.client import letters

    sent: tuple[Redriven, ...] | Redrive = await letters.redrive(broker, tasks, again=again, rate=rate)
    if isinstance(sent, letters.Redrive):
        return sent
    return [{"task": one.task, "redriven_as": one.redriven_as, "n": one.n, "repeated": one.repeated} for one in sent]


async def _start(broker: Broker, which: Which, *, limit: int, rate: float) -> Redrive:
    from weft.client import letters

    return await letters.redrive_all(broker, which, limit=limit, rate=rate)


async def _count(broker: Broker, which: Which) -> int:
    from weft.client import letters

    return (await letters.letters(broker, which, state="open", limit=1)).total


async def _follow(broker: Broker, job: Redrive, printer: Printer) -> Redrive:
    """Wait until a job is over, also while the coordinator's leader changes."""
    from weft.client import letters
    from weft_protocols.errors import Unavailable

    shown = -1
    while job.state == "running":
        await asyncio.sleep(LOOK)
        try:
            found = await letters.redrives(broker)
        except Unavailable as error:
            printer.talk(f"waiting: {error}")
            continue
        job = next((one for one in found if one.job == job.job), job)
        if job.redriven != shown:
            shown = job.redriven
            printer.progress(f"{job.redriven} sent")
    return job


def _either(which: dict[str, Any]) -> None:
    if which["everything"] or which["agent"] or which["matching"] or which["since"]:
        raise click.UsageError("name tasks, or say which letters by --agent, --matching, --since or --all; not both")


def _chosen(which: dict[str, Any]) -> Which:
    from weft.client.letters import Which

    chosen = Which(which["agent"], which["matching"], which["since"])
    if chosen == Which() and not which["everything"]:
        raise click.UsageError("name tasks, or say which letters by --agent, --matching, --since or --all")
    return chosen


def _words(which: Which) -> str:
    agent = f" of {which.agent}" if which.agent else ""
    return agent + (f" with {which.reason!r}" if which.reason else "")


def _record(one: DeadLetterInfo) -> dict[str, Any]:
    return {
        "task": one.task,
        "agent": one.agent,
        "caller": one.caller,
        "context": one.context,
        "state": one.state,
        "time": rfc3339(one.time / 1000),
        "attempts": one.attempts,
        "reason": one.reason,
        "error": one.error,
        "replica": one.replica,
        "version": one.version,
        "redriven_as": one.redriven_as,
        "discarded_because": one.discarded_because,
    }


def _job(one: Redrive) -> dict[str, Any]:
    return {
        "job": one.job,
        "state": one.state,
        "agent": one.agent,
        "reason": one.reason,
        "redriven": one.redriven,
        "failed": one.failed,
        "failures": [dict(failure) for failure in one.failures],
        "rate": one.rate,
        "started": rfc3339(one.started / 1000),
        "ended": rfc3339(one.ended / 1000) if one.ended else None,
    }


def _job_line(one: Redrive) -> str:
    lines = [f"redrive {one.job} {one.state}: {one.redriven} sent, {one.failed} failed"]
    lines += [f"  {failure['task']}: {failure['why']}" for failure in one.failures]
    return "\n".join(safe(line) for line in lines)


def _part(part: dict[str, Any]) -> str:
    if "text" in part:
        return str(part["text"])
    if "data" in part:
        import json

        return json.dumps(part["data"], ensure_ascii=False)
    return f"file {part.get('name') or '-'}: {part.get('content') or part.get('url')}"


__all__ = ["command"]
