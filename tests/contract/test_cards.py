"""The agent's card, as clients of every transport get it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from a2a.client.client import Client
from a2a.types import a2a_pb2 as pb

from weft.core.cardkeys import trusted_keys, verify
from weft_protocols.cards import digest, missing_fields

if TYPE_CHECKING:
    from tests.contract.conftest import Everywhere, Stage

pytestmark = pytest.mark.anyio


async def test_a_card_is_complete_signed_and_lists_its_interfaces(stage: Stage, transport: str) -> None:
    card = await stage.card("contract", transport)
    assert missing_fields(card) == ()
    assert (card.name, card.version) == ("contract", "1.2.3")
    assert {skill.id for skill in card.skills} == {"do", "answer"}
    assert card.capabilities.streaming
    assert card.capabilities.push_notifications
    assert {interface.protocol_version for interface in card.supported_interfaces} <= {"1.0", "0.3"}
    keys = trusted_keys(stage.mesh.settings("local"))
    assert keys is not None
    assert verify(card, keys)


async def test_the_card_is_the_same_under_whichever_interfaces(stage: Stage) -> None:
    native, web = await stage.card("contract", "nats"), await stage.card("contract", "rest")
    for card in (native, web):
        card.ClearField("supported_interfaces")
        card.ClearField("signatures")
    # How to authenticate is a matter of the gateway.
    web.ClearField("security_schemes")
    web.ClearField("security_requirements")
    assert digest(native) == digest(web)


async def test_those_who_ask_get_the_extended_card(blocking: Client) -> None:
    card = await blocking.get_extended_agent_card(pb.GetExtendedAgentCardRequest())
    assert {skill.id for skill in card.skills} == {"do", "answer", "secret"}
    assert card.version == "1.2.3"


async def test_extended_cards_are_the_same_everywhere(everywhere: Everywhere) -> None:
    async def shown(client: Client) -> list[object]:
        card = await client.get_extended_agent_card(pb.GetExtendedAgentCardRequest())
        return [card.name, card.version, sorted(skill.id for skill in card.skills), digest(_core(card))]

    await everywhere.same(shown)


def _core(card: pb.AgentCard) -> pb.AgentCard:
    made = pb.AgentCard()
    made.CopyFrom(card)
    for field in ("signatures", "security_schemes", "security_requirements"):
        made.ClearField(field)
    return made
