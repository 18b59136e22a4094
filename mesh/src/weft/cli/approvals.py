"""`mesh approvals`: what waits for a person, and deciding about it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import click

from weft.cli.operate import ListingGroup, as_operator
from weft.cli.output import Column, Printer, ago, output_option, rfc3339, safe

if TYPE_CHECKING:
    from weft.client.approvals import ApprovalInfo, Page
    from weft.core.broker import Broker

NAME: Final = "mesh approvals"
STATES: Final = ("pending", "approved", "denied", "expired", "withdrawn", "used")
EVERY: Final = 2.0
"""Seconds between looks with `--watch`."""
APPROVER: Final = "WEFT_APPROVER"
"""Environment variable with the name of the person at this terminal."""
COLUMNS: Final = (
    Column("id"),
    Column("state", state=True),
    Column("risk"),
    Column("agent"),
    Column("needs"),
    Column("age", show=ago, right=True),
    Column("left", show=ago, right=True),
    Column("title", flexible=True),
)


@click.group(cls=ListingGroup)
def command(**_: Any) -> None:
    """List what waits for a person to approve it; approve and deny.

    Without a command it is `list`. mesh.yaml says who may decide: `approvers: {alice: [finance, ops]}`.
    """


@command.command("list")
@click.option(
    "--state",
    type=click.Choice((*STATES, "all")),
    default="pending",
    show_default=True,
    help="Pending: somebody has to decide.",
)
@click.option("--agent", default="", help="Only what this agent wants.")
@click.option("--role", default="", help="Only what needs this role.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True, help="At most so many.")
@click.option("--watch", is_flag=True, help="Print every change, until Ctrl-C.")
@output_option
def list_approvals(state: str, agent: str, role: str, *, limit: int, watch: bool, output: str) -> None:
    """List approvals, the one asked last first."""
    states = () if state == "all" else (state,)

    async def read(broker: Broker, states: tuple[str, ...] = states) -> Page:
        from weft.client import approvals

        return await approvals.approvals(broker, states=states, agent=agent, role=role, limit=limit)

    if watch:
        printer = Printer("jsonl" if output == "json" else output)
        as_operator(lambda broker: _follow(lambda: read(broker, ()), printer), name=NAME)
    page = as_operator(read, name=NAME)
    printer = Printer(output)
    empty = "nothing waits for an approval" if state == "pending" else "no approvals"
    rows = [record(one) if printer.machine else _row(one) for one in page.approvals]
    printer.rows(rows, COLUMNS, empty=empty)
    if len(page.approvals) < page.total:
        printer.talk(f"{page.total - len(page.approvals)} more; see --limit")


# For the help and for completion: options without a command are those of the list.
command.params += [one for one in list_approvals.params if isinstance(one, click.Option)]


@command.command()
@click.argument("approval_id", metavar="ID")
@output_option
def show(approval_id: str, output: str) -> None:
    """Show approval ID (the beginning of it will do): what exactly is to be done, for whom, and who decided."""
    from weft.client import approvals

    one = as_operator(_known(approval_id, lambda broker: approvals.approval(broker, approval_id)), name=NAME)
    Printer(output).record(record(one), text=_text(one))


def _decision(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a decision."""
    for option in (
        click.option("--role", default="", help="As which role; the first one that is needed otherwise."),
        click.option("--as", "who", default="", help=f"Who decides; ${APPROVER} or the login name otherwise."),
        click.argument("approval_id", metavar="ID"),
    ):
        function = option(function)
    return function


@command.command()
@_decision
@click.option("--reason", default="", help="Why; the task and the record see it.")
@output_option
def approve(approval_id: str, who: str, role: str, *, reason: str, output: str) -> None:
    """Approve what ID stands for, exactly as `show` shows it."""
    _decide(approval_id, who, allow=True, role=role, reason=reason, output=output)


@command.command()
@_decision
@click.option("--reason", required=True, help="Why; the task and the record see it.")
@output_option
def deny(approval_id: str, who: str, role: str, *, reason: str, output: str) -> None:
    """Deny what ID stands for. One person who denies ends it, whoever approved before."""
    if not reason.strip():
        raise click.UsageError("--reason is empty; say why it is denied")
    _decide(approval_id, who, allow=False, role=role, reason=reason, output=output)


def _decide(approval_id: str, who: str, *, allow: bool, role: str, reason: str, output: str) -> None:
    from weft.client import approvals

    person = who or _person()

    def work(broker: Broker) -> Any:
        return approvals.decide(broker, approval_id, who=person, allow=allow, reason=reason, role=role)

    one = as_operator(_known(approval_id, work), name=NAME)
    said = f"{person} {'approved' if allow else 'denied'} {one.id}: {one.title}"
    if one.state == "pending":
        said += f"\nstill needed: {_needs(one.open)}"
    Printer(output).record(record(one), text=safe(said))


def _person() -> str:
    """Who sits here, as far as this machine knows."""
    import getpass

    if named := os.environ.get(APPROVER):
        return named
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise click.UsageError(f"it is not known who you are: give --as NAME, or set {APPROVER}") from None


def _known(approval_id: str, work: Callable[[Broker], Any]) -> Callable[[Broker], Any]:
    """The work, with NotFound that names the nearest id for one that is none."""

    async def known(broker: Broker) -> ApprovalInfo:
        from weft.cli.errors import NotFound
        from weft.client import approvals
        from weft.core.config import did_you_mean
        from weft_protocols.errors import InvalidParams

        try:
            found: ApprovalInfo = await work(broker)
            return found
        except InvalidParams as error:
            page = await approvals.approvals(broker, states=(), limit=1000)
            ids = [one.id for one in page.approvals]
            if any(id_.startswith(approval_id) for id_ in ids):
                raise
            pending = [one.id for one in page.approvals if one.state == "pending"]
            near = did_you_mean(approval_id, ids)
            shown = f"pending are {', '.join(pending[:10])}" if pending else "nothing is pending"
            raise NotFound(f"there is no approval {approval_id!r}{near}; {shown}") from error

    return known


async def _follow(read: Callable[[], Any], printer: Printer) -> None:
    """Print approvals as they are asked for and decided."""
    known: dict[str, tuple[str, int]] = {}
    first = True
    while True:
        page: Page = await read()
        for one in reversed(page.approvals):
            now = (one.state, len(one.decisions))
            if known.get(one.id) != now and not (first and one.state != "pending"):
                text = f"{one.id} {one.state}: {one.agent} wants: {one.title}"
                if one.state == "pending":
                    text += f" (needs {_needs(one.open)}; mesh approvals show {one.id[:8]})"
                printer.item(record(one), text=safe(text))
            known[one.id] = now
        first = False
        await asyncio.sleep(EVERY)


def record(one: ApprovalInfo) -> dict[str, Any]:
    """An approval as JSON values: times are RFC 3339 or null."""
    from dataclasses import asdict

    told = asdict(one)
    for name in ("asked", "expires", "settled", "used"):
        told[name] = _time(told[name])
    for name in ("needs", "open"):
        told[name] = [{"role": role, "count": count} for role, count in told[name]]
    told["chain"] = list(one.chain)
    told["decisions"] = [{**decision, "at": _time(decision["at"])} for decision in one.decisions]
    return told


def _time(milliseconds: int) -> str | None:
    return rfc3339(milliseconds / 1000) if milliseconds else None


def _row(one: ApprovalInfo) -> dict[str, Any]:
    now = time.time()
    pending = one.state == "pending"
    return {
        "id": one.id,
        "state": one.state,
        "risk": one.risk,
        "agent": one.agent,
        "needs": _needs(one.open if pending else one.needs),
        "age": max(0.0, now - one.asked / 1000),
        "left": max(0.0, one.expires / 1000 - now) if pending else None,
        "title": one.title,
    }


def _needs(needs: Any) -> str:
    return " + ".join(f"{count} {role or 'approver'}" for role, count in needs)


def _text(one: ApprovalInfo) -> str:
    """An approval for people: all of what is approved, so that nobody decides about something else."""
    import json

    head = {
        "approval": one.id,
        "state": f"{one.state}{f': {one.why}' if one.why else ''}",
        "wants": one.title,
        "agent": one.agent,
        "task": one.task,
        "tool": f"{one.server} {one.tool}" if one.kind == "tool" else "",
        "risk": one.risk,
        "for": f"{one.requester}, by {' > '.join(one.chain)}" if one.chain else one.requester,
        "needs": _needs(one.needs),
        "asked": _time(one.asked),
        "expires": _time(one.expires),
        "used": _time(one.used),
        "arguments": one.digest if one.kind == "tool" else "",
        "definition": one.definition,
        "policy": one.policy,
    }
    lines = [f"{f'{name}:':<12}{value}" for name, value in head.items() if value]
    if one.details:
        lines += ["details:", *(f"  {line}" for line in json.dumps(one.details, indent=2).splitlines())]
    for said in one.decisions:
        how = "approved" if said["allow"] else "denied"
        as_role = f" as {said['role']}" if said["role"] else ""
        reason = f": {said['reason']}" if said["reason"] else ""
        lines.append(f"{_time(said['at'])}  {said['who']} {how}{as_role}{reason}")
    if one.state == "pending":
        lines += ["", f"next: mesh approvals approve {one.id[:8]}, or mesh approvals deny {one.id[:8]} --reason ..."]
    return "\n".join(safe(line) for line in lines)


__all__ = ["command", "record"]
