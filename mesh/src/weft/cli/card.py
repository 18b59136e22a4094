"""`mesh card`: the card of an agent, its signature checked."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click

from weft.cli.output import Printer, output_option, pairs, safe

if TYPE_CHECKING:
    from weft.client.cards import Known


@click.command()
@click.argument("name")
@click.option("--extended", is_flag=True, help="The extended card, which not everybody gets.")
@output_option
def command(name: str, *, extended: bool, output: str) -> None:
    """Check and print the card of agent NAME: as A2A JSON with -o json or -o yaml.

    Exit code 4 when it is not signed with a key of this mesh, 5 when there is no such agent.
    """
    from weft_protocols.cards import card_json

    known = asyncio.run(_known(name, extended=extended))
    printer = Printer(output)
    card = card_json(known.card)
    printer.record(card, text=_text(known, card))
    if printer.machine:
        printer.talk(f"{known.agent} {known.version}: {_signature(known)}")


async def _known(name: str, *, extended: bool) -> Known:
    from weft.client.cards import CardDirectory
    from weft.core.broker import Broker
    from weft.core.config import load_settings

    broker = await Broker.connect(load_settings(), name="mesh card")
    try:
        directory = CardDirectory(broker)
        return await (directory.extended(name) if extended else directory.known(name))
    finally:
        await broker.close()


def _text(known: Known, card: dict[str, Any]) -> str:
    head = {
        "name": card["name"],
        "agent": known.agent,
        "version": known.version,
        "description": card["description"],
        "digest": known.digest,
        "signature": _signature(known),
        "interfaces": [f"{one['url']} ({one['protocolBinding']})" for one in card.get("supportedInterfaces", ())],
        "input": card["defaultInputModes"],
        "output": card["defaultOutputModes"],
        "extensions": [one["uri"] for one in card["capabilities"].get("extensions", ())],
        "extended card": card["capabilities"].get("extendedAgentCard", False),
    }
    skills = [f"  {one['id']}  [{', '.join(one['tags'])}]  {one['description']}" for one in card["skills"]]
    return "\n".join([pairs(head), "", "skills:", *map(safe, skills)])


def _signature(known: Known) -> str:
    if known.signed_by:
        return f"good, key {known.signed_by}"
    if known.card.signatures:
        return "not checked: no key of this mesh is known here; set WEFT_CARD_JWKS to the file with its keys"
    return "none"
