"""Cards of the agents of this mesh: asked of the coordinator, checked, and kept for when it is away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from a2a.types import a2a_pb2 as pb

from weft.client import coordinator, reads
from weft.client.coordinator import AgentInfo
from weft.core import cardkeys
from weft.core.broker import Broker
from weft.core.cardkeys import Jwks
from weft_protocols import a2a, cards, subjects
from weft_protocols.cards import CardNotTrusted
from weft_protocols.errors import AgentNotFound, InvalidName, Unavailable

log = logging.getLogger("weft.client")

FRESH: Final = 2.0
"""Seconds an answer of the coordinator counts without asking again."""
ANSWER: Final = 1.0
"""Seconds the coordinator has to answer where an older answer is at hand."""
PAUSE: Final = 10.0
"""Seconds it is left in peace after it did not, so that a coordinator that hangs holds nobody up for long."""
UNKNOWN_KEPT: Final = 1024
"""Names remembered as nobody's."""


@dataclass(frozen=True, slots=True)
class Known:
    """The current card of an agent."""

    agent: str
    version: str
    digest: str
    """SHA-256 of the canonical core card."""
    card: pb.AgentCard
    """As the coordinator publishes it: signed if it has a key, with the interface of this mesh. Not to be changed."""
    signed_by: str
    """Id of the mesh's key whose signature was checked; empty where no key is known here."""


@dataclass(slots=True)
class _Entry:
    """What was last told of an agent: a card, or that there is none."""

    known: Known | None
    told: Mapping[str, Any]
    until: float
    """When to ask again, by the loop's clock."""


class CardDirectory:
    """The cards of a mesh as one caller sees them.

    An answer counts for two seconds. Then the coordinator is asked again, and while it is away the last answer
    stands. Cards are checked against the keys of the mesh where they are known.

    Args:
        broker: A connection as the caller, or as a member of account MESH.
        caller: Who asks; default: the connection's identity.
        keys: Keys whose signatures count; default: those the connection's settings lead to. An empty set trusts nobody.
    """

    def __init__(self, broker: Broker, caller: str = "", *, keys: Jwks | None = None) -> None:
        self._broker = broker
        self._caller = caller or broker.settings.identity
        self._keys = keys
        self._found = cardkeys.trusted_keys(broker.settings) if keys is None else None
        self._entries: dict[str, _Entry] = {}
        self._asking: dict[str, asyncio.Lock] = {}
        self._agents: tuple[AgentInfo, ...] | None = None
        self._agents_until = 0.0
        self._listing = asyncio.Lock()

    async def card(self, agent: str) -> pb.AgentCard:
        """A copy of the current card of an agent.

        Raises:
            AgentNotFound: no agent of that name ever registered here.
            CardNotTrusted: the card is not signed by a key of this mesh.
            Unavailable: the coordinator does not answer, and the card was never asked for before.
        """
        made = pb.AgentCard()
        made.CopyFrom((await self.known(agent)).card)
        return made

    async def known(self, agent: str) -> Known:
        """The current card of an agent with its version and digest. Raises as `card`."""
        entry = self._entries.get(agent)
        if entry is None or self._old(entry.until):
            lock = self._asking.setdefault(agent, asyncio.Lock())
            try:
                async with lock:
                    entry = self._entries.get(agent)
                    if entry is None or self._old(entry.until):
                        entry = await self._ask(agent, entry)
            finally:
                if not lock.locked():
                    self._asking.pop(agent, None)
        if entry.known is None:
            raise AgentNotFound(str(entry.told["message"]))
        return entry.known

    async def extended(self, agent: str) -> Known:
        """The extended card of an agent, always asked for. `digest` is that of the extended card.

        Raises:
            UnsupportedOperation: there is no such agent, or it has no extended card.
            ExtendedAgentCardNotConfigured, CardNotTrusted, Unavailable.
        """
        reply = await reads.call(
            self._broker,
            "GetExtendedAgentCard",
            agent=agent,
            caller=self._caller,
            request=pb.GetExtendedAgentCardRequest(),
        )
        card = a2a.decode(pb.AgentCard, reply.data)
        return Known(agent, card.version, cards.digest(card), card, self._signer(card))

    async def list(self, *, name: str = "", skill: str = "", tag: str = "") -> tuple[AgentInfo, ...]:
        """The agents of the mesh by name; only those that match the patterns given (see `cards.matches`).

        Raises Unavailable if the coordinator does not answer and never did.
        """
        if self._agents is None or self._old(self._agents_until):
            async with self._listing:
                if self._agents is None or self._old(self._agents_until):
                    await self._list_again()
        return tuple(
            one for one in self._agents or () if cards.matches(one.name, one.skills, name=name, skill=skill, tag=tag)
        )

    def forget(self, agent: str | None = None) -> None:
        """Ask again next time: for one agent, or for all and their list."""
        if agent is not None:
            self._entries.pop(agent, None)
        else:
            self._entries.clear()
            self._agents = None

    async def _ask(self, agent: str, before: _Entry | None) -> _Entry:
        try:
            subjects.check_name(agent)
        except InvalidName as error:
            raise AgentNotFound(str(error)) from error
        body = {"agent": agent}
        timeout = coordinator.TIMEOUT if before is None or before.known is None else ANSWER
        told: Mapping[str, Any]
        lasts = FRESH
        try:
            told = await coordinator.call(self._broker, "card", body, caller=self._caller, timeout=timeout)
            known = before.known if before is not None and before.told == told else self._checked(told)
        except AgentNotFound as error:
            told, known = {"message": str(error)}, None
            self._make_room()
        except Unavailable:
            if before is None or before.known is None:
                raise
            told, known, lasts = before.told, before.known, PAUSE
        entry = self._entries[agent] = _Entry(known, told, _now() + lasts)
        return entry

    def _checked(self, told: Mapping[str, Any]) -> Known:
        card = cards.parse_card(told["card"], what=f"what the coordinator told of {told['agent']}")
        return Known(told["agent"], told["version"], told["digest"], card, self._signer(card))

    def _signer(self, card: pb.AgentCard) -> str:
        if self._keys is not None:
            return cardkeys.verify(card, self._keys)
        try:
            return cardkeys.verify(card, self._found) if self._found is not None else ""
        except CardNotTrusted:
            # The mesh may have another key since; only what is on disk here is looked at.
            again = cardkeys.trusted_keys(self._broker.settings)
            if again is None or again == self._found:
                raise
            self._found = again
            return cardkeys.verify(card, again)

    async def _list_again(self) -> None:
        timeout, lasts = coordinator.TIMEOUT if self._agents is None else ANSWER, FRESH
        try:
            told = await coordinator.call(self._broker, "agents", caller=self._caller, timeout=timeout)
            self._agents = tuple(AgentInfo.of(one) for one in told["agents"])
        except Unavailable:
            if self._agents is None:
                raise
            lasts = PAUSE
        self._agents_until = _now() + lasts

    def _old(self, until: float) -> bool:
        return _now() >= until

    def _make_room(self) -> None:
        """Names that are nobody's come from anybody, so that only so many are kept."""
        unknown = [name for name, entry in self._entries.items() if entry.known is None]
        for name in unknown[: max(0, len(unknown) - UNKNOWN_KEPT + 1)]:
            del self._entries[name]


def _now() -> float:
    return asyncio.get_running_loop().time()


async def pin(broker: Broker, agent: str, what: str, *, timeout: float = coordinator.TIMEOUT) -> dict[str, Any]:
    """Make an earlier card of an agent its current one: by version, or by digest or the beginning of one.

    The answer has `agent`, `version` and `digest`. Operator only.

    Raises:
        AgentNotFound: there is no such agent.
        InvalidParams: there is no such card, or its content is not kept any more; the message lists those there are.
    """
    return await coordinator.call(broker, "pin", {"agent": agent, "card": what}, timeout=timeout)
