"""The cards of the registry as they are published: with the interface of this mesh, and signed with its key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from a2a.types import a2a_pb2 as pb

from weft.core.cardkeys import CardKey
from weft_coordinator.decide import registry
from weft_coordinator.decide.registry import AgentRecord
from weft_coordinator.shell.registry import RegistryStore
from weft_protocols import cards
from weft_protocols.errors import ExtendedAgentCardNotConfigured, UnsupportedOperation


class CardService:
    """Publishes cards.

    Args:
        store: The registry.
        key: What cards are signed with; None: they are not.
    """

    def __init__(self, store: RegistryStore, key: CardKey | None) -> None:
        self.store = store
        self._key = key
        self._signed: dict[str, tuple[Mapping[str, Any], dict[str, Any]]] = {}

    async def current(self, agent: str) -> dict[str, Any]:
        """Agent, version, digest and card as the operation `card` answers. AgentNotFound if there is no such agent."""
        await self.store.sync()
        record = registry.known(self.store.records, agent)
        shown = record.cards.shown
        core, card = self._signed.get(agent, (None, {}))
        if core != shown.card:
            card = cards.card_json(self._publish(record, shown.card))
            self._signed[agent] = shown.card, card
        return {"agent": agent, "version": shown.version, "digest": shown.digest, "card": card}

    async def extended(self, agent: str) -> pb.AgentCard:
        """The extended card of an agent.

        Raises:
            UnsupportedOperation: there is no such agent, or its card declares no extended one.
            ExtendedAgentCardNotConfigured: the card declares one, and there is none.
        """
        await self.store.sync()
        record = self.store.get(agent)
        if record is None or not record.cards.shown.digest:
            raise UnsupportedOperation(f"no agent {agent!r} ever registered in this mesh")
        shown = record.cards.shown
        if shown.extended is not None:
            return self._publish(record, shown.extended)
        if cards.parse_card(shown.card).capabilities.extended_agent_card:
            raise ExtendedAgentCardNotConfigured(f"agent {agent} declares an extended card and gave none")
        raise UnsupportedOperation(f"agent {agent} has no extended card")

    def _publish(self, record: AgentRecord, core: Mapping[str, Any]) -> pb.AgentCard:
        card = cards.published(cards.parse_card(core), [cards.mesh_interface(record.agent)])
        return self._key.sign(card) if self._key is not None else card
