"""Whose work is handed back at once: a replica whose connection closed and did not come back, and what it held.

A false hand-back does no harm, since claims fence: two replicas at most do the same step twice, and one of them stores
it. It costs an attempt, though, so a doubt is always a no: who waits out the acknowledgement wait loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from weft_protocols import connections, subjects
from weft_protocols.accounts import ACK
from weft_protocols.errors import ParseError
from weft_protocols.records import HELD, Claim
from weft_protocols.resources import STREAM

WAIT: Final = 2_000
"""Milliseconds a connection may take to come back."""
REMEMBER: Final = 120_000
"""Milliseconds a closed connection is remembered, for a coordinator that leads only later."""
MOST: Final = 50_000
"""Connections remembered; of more than these, the oldest count as never seen."""

Peer: TypeAlias = tuple[str, str]
"""(agent, replica), or (`connections.COORDINATOR`, id)."""
Work: TypeAlias = tuple[str, int]
"""(lane, stream sequence) of a message that was delivered."""


def connection(data: bytes) -> tuple[Peer, str] | None:
    """Who a broker's event about a connection is about, and the connection's id; None for all that concern nobody."""
    try:
        told = json.loads(data)
        client = told["client"]
        found = connections.peer(str(client["acc"]), str(client.get("name", "")))
        return None if found is None else (found, f"{told['server']['id']}/{client['id']}")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


@dataclass(slots=True)
class _Seen:
    open: set[str] = field(default_factory=set)
    """Connections known to be open. One made before this coordinator listened is not among them."""
    closed: int = 0
    """When the last one closed, unix milliseconds; 0 while it is not known to be closed."""


class Connections:
    """A fold of what the broker tells of connections. It knows who closed, never for sure who is there."""

    def __init__(self) -> None:
        self._seen: dict[Peer, _Seen] = {}

    def opened(self, peer: Peer, connection: str) -> None:
        """A connection was made."""
        seen = self._seen.pop(peer, None) or _Seen()
        seen.open.add(connection)
        seen.closed = 0
        self._seen[peer] = seen
        while len(self._seen) > MOST:
            del self._seen[next(iter(self._seen))]

    def closed(self, peer: Peer, connection: str, *, now: int) -> bool:
        """A connection ended. Whether it was the last one of its replica that is known."""
        seen = self._seen.setdefault(peer, _Seen())
        seen.open.discard(connection)
        if seen.open:
            return False  # a newer one is there; this one was noticed late
        seen.closed = now
        return True

    def gone(self, now: int, *, agent: str = "", after: int = WAIT) -> list[Peer]:
        """Whose connection closed `after` milliseconds ago or earlier and did not come back; all, or an agent's."""
        for peer in [peer for peer, seen in self._seen.items() if seen.closed and now - seen.closed > REMEMBER]:
            del self._seen[peer]
        return [
            peer
            for peer, seen in self._seen.items()
            if seen.closed and now - seen.closed >= after and agent in ("", peer[0])
        ]

    def forget(self, peers: Iterable[Peer] | None = None) -> None:
        """These were dealt with; None: nothing seen so far says anything, as after a reconnect of one's own."""
        if peers is None:
            self._seen.clear()
        for peer in peers or ():
            self._seen.pop(peer, None)


def held(agent: str, replicas: Collection[str], claims: Mapping[str, bytes]) -> dict[str, Work]:
    """What these replicas of an agent held, by task, out of the last claim of each task.

    The subject to hand back on is never taken from a claim, which the agent wrote: only lane and sequence are.
    """
    found: dict[str, Work] = {}
    for task, data in claims.items():
        try:
            claim = Claim.decode(data)
            if claim.replica in replicas and claim.state == HELD:
                found[task] = _work(agent, claim.delivery)
        except (ParseError, ValueError, IndexError, AttributeError, TypeError):
            continue
    return found


def _work(agent: str, acknowledgement: str) -> Work:
    """Lane and sequence in an acknowledgement subject; ValueError where it is no delivery to this agent."""
    tokens = acknowledgement.split(".")
    lanes = {subjects.consumer(agent, lane): lane for lane in subjects.LANES}
    if tokens[2] != STREAM or tokens[3] not in lanes or not tokens[5].isascii():
        raise ValueError(f"{acknowledgement} is no delivery to {agent}")
    return lanes[tokens[3]], int(tokens[5])


@dataclass(frozen=True, slots=True)
class Delivered:
    """How far a lane had been delivered, and up to where everything was acknowledged: stream sequences.

    Taken when a connection closes: a task that was delivered by then and that nobody has claimed two seconds later was
    on its way to who is gone.
    """

    last: int
    floor: int
    count: int
    """Deliveries so far."""

    def covers(self, sequence: int) -> bool:
        """Whether a message with this sequence may have been delivered and not acknowledged."""
        return self.floor < sequence <= self.last


def acknowledgement(agent: str, work: Work, *, count: int) -> str:
    """Subject on which a delivery is answered.

    The broker goes by the message's sequence, but takes no answer whose delivery has a number below all that are under
    way: the number of the latest, `count`, is always good.
    """
    lane, sequence = work
    return f"{ACK}.{STREAM}.{subjects.consumer(agent, lane)}.1.{sequence}.{count}.0.0"
