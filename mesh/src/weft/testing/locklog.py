"""What the coordinator's log says of locks, and the laws it must keep.

1. No two requests hold a name unless both are shared, or one re-enters what the other's task holds.
2. Who asked first is served first: no grant passes an earlier request for the name that excludes it.
3. A later grant of a name has a greater token, and a request that is taken over gets a greater one as well.
4. Whoever holds or waits was asked for and not ended before.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import msgpack

from weft.core.broker import Broker
from weft_protocols.errors import ApiError
from weft_protocols.resources import COORD, DECIDED

_NO_MESSAGE: Final = 10037
Numbered = tuple[int, tuple[Any, ...]]
"""Number of an event in the log, and the event."""


async def decided(broker: Broker) -> list[Numbered]:
    """Every event of the coordinator's log, the first one first; `broker` is one of the mesh's own identities."""
    events: list[Numbered] = []
    start = 1
    while True:
        try:
            answer = await broker.api(f"STREAM.MSG.GET.{COORD}", {"seq": start, "next_by_subj": DECIDED})
        except ApiError as error:
            if error.err_code == _NO_MESSAGE:
                return events
            raise
        told = msgpack.unpackb(base64.b64decode(answer["message"]["data"]))
        events += [(told["first"] + n, tuple(event)) for n, event in enumerate(told["events"])]
        start = answer["message"]["seq"] + 1


@dataclass(slots=True)
class _Request:
    id: tuple[str, str]
    task: str
    names: tuple[str, ...]
    exclusive: bool
    chain: tuple[str, ...]
    asked: int
    token: int = 0

    def enters(self, other: _Request) -> bool:
        return other.task in self.chain

    def excludes(self, other: _Request) -> bool:
        return (self.exclusive or other.exclusive) and bool(set(self.names) & set(other.names))


def check(events: Iterable[Numbered], *, overtaken: int = 0) -> list[str]:
    """What breaks a law, in words.

    Args:
        events: The whole log.
        overtaken: How often a request may pass an earlier one: as the way out of a deadlock of the queue alone.
    """
    checked = _Checked()
    for number, event in events:
        if event[0] in ("lock.asked", "lock.taken"):
            checked.asked(number, event)
        elif event[0] in ("lock.granted", "lock.moved", "lock.freed", "lock.lost"):
            checked.changed(number, event)
    return checked.broken + (checked.passed if len(checked.passed) > overtaken else [])


class _Checked:
    """The log so far."""

    def __init__(self) -> None:
        self.broken: list[str] = []
        self.passed: list[str] = []
        self._known: dict[tuple[str, str], _Request] = {}
        self._last: dict[str, int] = {}

    def asked(self, number: int, event: tuple[Any, ...]) -> None:
        kind, agent, _, task, id_, _, names, exclusive, chain, *_ = event
        if (agent, id_) in self._known:
            self.broken.append(f"event {number}: {id_} is asked for twice")
        request = _Request((agent, id_), task, tuple(names), exclusive, tuple(chain), number)
        self._known[request.id] = request
        if kind == "lock.taken":
            self._granted(request, number)

    def changed(self, number: int, event: tuple[Any, ...]) -> None:
        kind, request = event[0], self._known.get((event[1], event[2]))
        if request is None:
            self.broken.append(f"event {number}: {kind} of {event[2]}, which nobody asked for")
        elif kind == "lock.granted" or (kind == "lock.moved" and request.token):
            self._granted(request, number)
        elif kind != "lock.moved":
            del self._known[request.id]

    def _granted(self, request: _Request, number: int) -> None:
        for other in self._known.values():
            if other is request or not request.excludes(other) or request.enters(other) or other.enters(request):
                continue
            if other.token:
                self.broken.append(f"event {number}: {request.id} is granted while {other.id} holds {other.names}")
            elif other.asked < request.asked and not request.chain:
                self.passed.append(f"event {number}: {request.id} passes {other.id}, which asked before")
        request.token = number
        for name in request.names if not request.chain else ():
            if number <= self._last.get(name, 0):
                self.broken.append(f"event {number}: the token of {name!r} was {self._last[name]} before")
            self._last[name] = number
