"""`mesh agents`: who is there, what they can do, how busy they are; and which of its cards an agent has."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from weft.cli.assess import SERVING
from weft.cli.health import agent_record
from weft.cli.observe import Facts, gather
from weft.cli.output import Column, Printer, ago, output_option, rfc3339

if TYPE_CHECKING:
    from weft.core.broker import Broker

T = TypeVar("T")

COLUMNS: Final = (
    Column("name", "AGENT"),
    Column("version"),
    Column("skills", flexible=True),
    Column("ready", "REPLICAS", right=True),
    Column("active", right=True),
    Column("queue", right=True),
    Column("last_seen", show=ago, right=True),
)
CARD_COLUMNS: Final = (
    Column("version"),
    Column("digest", show=lambda value: str(value)[:16]),
    Column("current"),
    Column("kept"),
    Column("first_seen"),
)
COORDINATOR_DOWN: Final = 3
DEFAULT: Final = "list"


class _Agents(click.Group):
    """A group that lists where no command is named, so that `mesh agents NAME` is a list of one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Agents)
def command(**_: Any) -> None:
    """List the agents and what they can do, or pin a card.

    Without a command it is `list`: `mesh agents NAME` shows one agent, `mesh agents --tag TAG` those with that tag.
    """


@command.command(DEFAULT)
@click.argument("name", default="")
@click.option("--skill", default="", help="Only agents with this skill; a pattern such as 'sum*' too.")
@click.option("--tag", default="", help="Only agents with a skill of this tag; a pattern too.")
@output_option
def list_agents(name: str, skill: str, *, tag: str, output: str) -> int:
    """List the agents: version, skills, replicas, tasks in work and waiting, last sign of life.

    NAME shows one agent, or those that match a pattern such as 'review-*'. Exit code 3 when the coordinator does not
    answer: then only the broker's part is known.
    """
    from fnmatch import fnmatchcase

    from weft_protocols.errors import AgentNotFound

    facts = asyncio.run(gather())
    printer = Printer(output)
    names = [one for one in facts.names if fnmatchcase(one, name or "*")]
    if name and not names and not any(c in name for c in "*?["):
        known = ", ".join(facts.names) or "none"
        raise AgentNotFound(f"there is no agent {name!r} in this mesh; there are: {known}")
    if (skill or tag) and facts.agents is not None:
        found = _as_operator(lambda broker: _search(broker, skill, tag))
        names = [one for one in names if one in found]
    rows = [_row(facts, one) for one in names]
    nobody = f"no agent {'matches' if name or skill or tag else 'yet; `mesh run FILE` runs one, mesh.yaml keeps it'}"
    printer.rows(rows, COLUMNS, empty=nobody)
    if facts.agents is None:
        printer.talk(f"mesh: the coordinator is down ({facts.silence}): versions, skills and replicas are not known")
        printer.talk("  next: mesh health")
        return COORDINATOR_DOWN
    return 0


# For the help and for completion: options without a command are those of the list.
command.params += [one for one in list_agents.params if isinstance(one, click.Option)]


@command.command()
@click.argument("name")
@click.argument("card", default="")
@output_option
def pin(name: str, card: str, *, output: str) -> None:
    """Make an earlier card of agent NAME its current one.

    CARD is its version, its digest or the beginning of that. A card that was replaced does not come back by itself,
    whatever replica registers with it. Without CARD: list the cards the agent had.
    """
    printer = Printer(output)
    if not card:
        rows = _as_operator(lambda broker: _history(broker, name))
        printer.rows(rows, CARD_COLUMNS)
        return
    told = _as_operator(lambda broker: _pin(broker, name, card))
    printer.record(told, text=f"{told['agent']} has card {told['version']} ({told['digest'][:16]})")


async def _search(broker: Broker, skill: str, tag: str) -> set[str]:
    from weft.client import coordinator

    told = await coordinator.call(broker, "agents", {"skill": skill, "tag": tag})
    return {one["name"] for one in told["agents"]}


async def _history(broker: Broker, name: str) -> list[dict[str, Any]]:
    from weft.client import coordinator

    told = await coordinator.call(broker, "card", {"agent": name})
    return [{**one, "first_seen": rfc3339(one["first_seen"] / 1000)} for one in told["history"]]


async def _pin(broker: Broker, name: str, card: str) -> dict[str, Any]:
    from weft.client import cards

    return await cards.pin(broker, name, card)


def _as_operator(work: Callable[[Broker], Awaitable[T]]) -> T:
    """Run `work` with a connection of the operator."""
    from weft.core.broker import Broker
    from weft.core.config import load_settings
    from weft_protocols.subjects import OPERATOR

    async def connected() -> T:
        broker = await Broker.connect(load_settings(OPERATOR), name="mesh agents")
        try:
            return await work(broker)
        finally:
            await broker.close()

    return asyncio.run(connected())


def _row(facts: Facts, name: str) -> dict[str, Any]:
    """One agent. Its ready replicas are those that report, or where nobody listens, ready processes."""
    row = agent_record(facts, name)
    ready: int | None = None
    if row["replicas"] is not None:
        ready = sum(replica["state"] in SERVING for replica in row["replicas"])
    elif facts.processes is not None:
        ready = sum(process["agent"] == name and process["state"] == "ready" for process in facts.processes)
    return {**row, "ready": ready}
