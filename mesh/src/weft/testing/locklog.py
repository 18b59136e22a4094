"""What the coordinator's log says of locks, and the laws it must keep.

1. No two requests hold a name unless both are shared, or one re-enters what the other's task holds.
2. Who asked first is served first: no grant passes an earlier request for the name that excludes it.
3. A later grant of a name has a greater token, and a request that is taken over gets a greater one as well.
4. Whoever holds or waits was asked for and not ended before.
5. Whoever is promised a name is the next to hold it, with the token it was promised, unless that is recalled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgpack

from weft.core.broker import Broker
from weft.testing.invariants import read_log
from weft_protocols.resources import COORD, DECIDED

Numbered = tuple[int, tuple[Any, ...]]
"""Number of an event in the log, and the event."""


@dataclass(frozen=True, slots=True)
class Commit:
    """One message of the coordinator's log."""

    seq: int
    """In the stream."""
    stored: float
    """When the broker stored it, unix seconds by the broker's clock."""
    epoch: int
    at: int
    """When it was decided, unix milliseconds by the leader's clock."""
    first: int
    """Number of its first event."""
    events: list[tuple[Any, ...]]

    def numbered(self) -> list[Numbered]:
        """Its events, each with its number."""
        return list(enumerate(self.events, self.first))


async def commits(broker: Broker) -> list[Commit]:
    """The coordinator's log, the first commit first; `broker` is one of the mesh's own identities."""
    found = []
    for entry in await read_log(broker, stream=COORD):
        if entry.subject == DECIDED:
            told = msgpack.unpackb(entry.data)
            events = [tuple(event) for event in told["events"]]
            found.append(Commit(entry.seq, entry.stored, told["epoch"], told["at"], told["first"], events))
    return found


async def decided(broker: Broker) -> list[Numbered]:
    """Every event of the coordinator's log, the first one first."""
    return [event for commit in await commits(broker) for event in commit.numbered()]


_OF_ONE = frozenset(f"lock.{what}" for what in ("granted", "promised", "recalled", "moved", "freed", "lost"))
"""Kinds of events of a request that is known."""


@dataclass(slots=True)
class Request:
    """A request that holds or waits."""

    id: tuple[str, str]
    """Agent and request."""
    task: str
    names: tuple[str, ...]
    exclusive: bool
    chain: tuple[str, ...]
    asked: int
    token: int = 0
    """0 while it waits."""
    promised: int = 0
    """The token it will have."""
    void: bool = False
    """Whether what it was promised has to be recalled before it is granted."""

    def enters(self, other: Request) -> bool:
        """Whether it may re-enter what the other one's task holds."""
        return other.task in self.chain

    def excludes(self, other: Request) -> bool:
        """Whether both cannot hold what they want at once."""
        return (self.exclusive or other.exclusive) and bool(set(self.names) & set(other.names))


def check(events: Iterable[Numbered], *, overtaken: int = 0) -> list[str]:
    """What breaks a law, in words.

    Args:
        events: The whole log.
        overtaken: How often a request may pass an earlier one: as the way out of a deadlock of the queue alone.
    """
    checked = Checked()
    for number, event in events:
        checked.take(number, event)
    return checked.broken + (checked.passed if len(checked.passed) > overtaken else [])


class Checked:
    """The log so far, and what broke a law in it."""

    def __init__(self) -> None:
        self.broken: list[str] = []
        self.passed: list[str] = []
        """Where a request passed an earlier one."""
        self.known: dict[tuple[str, str], Request] = {}
        """What holds or waits now."""
        self.grants: dict[int, Request] = {}
        """Every grant by its token."""
        self.promises: dict[int, Request] = {}
        """Every promise by its token; whoever dies under it may have no grant in the log."""
        self.granted: Request | None = None
        """The last one that was granted something."""
        self._last: dict[str, int] = {}
        self._lines: dict[str, list[Request]] = {}
        """Who is promised each name, the next one first."""

    def take(self, number: int, event: tuple[Any, ...]) -> None:
        """The next event, of whatever kind."""
        if event[0] in ("lock.asked", "lock.taken"):
            self._asked(number, event)
        elif event[0] in _OF_ONE:
            self._changed(number, event)

    def _asked(self, number: int, event: tuple[Any, ...]) -> None:
        kind, agent, _, task, id_, _, names, exclusive, chain, *_ = event
        if (agent, id_) in self.known:
            self.broken.append(f"event {number}: {id_} is asked for twice")
        request = Request((agent, id_), task, tuple(names), exclusive, tuple(chain), number)
        self.known[request.id] = request
        if kind == "lock.taken":
            self._granted(request, number)

    def _changed(self, number: int, event: tuple[Any, ...]) -> None:
        kind, request = event[0], self.known.get((event[1], event[2]))
        if request is None:
            self.broken.append(f"event {number}: {kind} of {event[2]}, which nobody asked for")
        elif kind == "lock.promised":
            request.promised = number
            self.promises[number] = request
            self._lines.setdefault(request.names[0], []).append(request)
        elif kind == "lock.granted":
            self._granted(request, number)
        elif kind == "lock.moved":
            self._void(request.names if request.token or request.promised else ())
            if request.token:
                self._granted(request, number)
        else:
            self._unpromise(request)
            if kind != "lock.recalled":
                del self.known[request.id]

    def _void(self, names: Iterable[str]) -> None:
        for name in names:
            for one in self._lines.get(name, ()):
                one.void = True

    def _unpromise(self, request: Request) -> None:
        if request.promised:
            self._lines[request.names[0]].remove(request)
            request.promised, request.void = 0, False

    def _granted(self, request: Request, number: int) -> None:
        for other in self.known.values():
            if other is request or not request.excludes(other) or request.enters(other) or other.enters(request):
                continue
            if other.token:
                self.broken.append(f"event {number}: {request.id} is granted while {other.id} holds {other.names}")
            elif other.asked < request.asked and not request.chain:
                self.passed.append(f"event {number}: {request.id} passes {other.id}, which asked before")
        if not request.promised:
            self._void(request.names)
        elif request.void or self._lines[request.names[0]][0] is not request:
            self.broken.append(f"event {number}: {request.id} is granted what it was promised out of turn")
        request.token = token = request.promised or number
        self._unpromise(request)
        self.grants[token] = self.granted = request
        for name in request.names if not request.chain else ():
            if token <= self._last.get(name, 0):
                self.broken.append(f"event {number}: the token of {name!r} was {self._last[name]} before")
            self._last[name] = token
