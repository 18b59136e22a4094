"""What decisions about locks and about deadlocks are made with, and how replicas are told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgpack

from weft_coordinator.decide.index import Entry, TaskIndex
from weft_coordinator.decide.ledger import Event
from weft_coordinator.decide.locks import Locks
from weft_protocols import subjects
from weft_protocols.errors import BrokerError
from weft_protocols.records import Control

log = logging.getLogger("weft.coordinator")

Key = tuple[str, str]
"""(agent, replica)."""


class Decider(Protocol):
    """The leader, as parts see it (`weft_coordinator.shell.leader`)."""

    @property
    def leading(self) -> bool:
        """Whether it leads."""
        ...

    def submit(self, act: Callable[[int], Sequence[Event]]) -> asyncio.Future[list[int]]:
        """Decide now; the future has the numbers of the events once they are stored."""
        ...


class Synced(Protocol):
    """What brings the task index up to date."""

    async def sync(self) -> None:
        """Return when everything stored until now is in the index."""
        ...


class Sender(Protocol):
    """Sends a message without waiting."""

    def __call__(self, subject: str, data: bytes) -> None:
        """Send; raises BrokerError at once."""
        ...


class Speaker:
    """Speaks to replicas. What gets lost is repaired by their session."""

    def __init__(self, send: Sender) -> None:
        self._send = send

    def tell(self, key: Key, op: str, data: Mapping[str, Any]) -> None:
        """Send a control message to a replica."""
        try:
            self._send(subjects.ctl(*key), Control(op, data=bytes(msgpack.packb(data))).encode())
        except BrokerError as error:
            log.debug("replica %s of %s is not told %s: %s", key[1], key[0], op, error)


@dataclass(frozen=True, slots=True)
class Shared:
    """What decisions about locks and about deadlocks are made with."""

    leader: Decider
    locks: Locks
    index: TaskIndex
    tail: Synced
    speaker: Speaker
    clock: Callable[[], float]
    """Seconds, monotonic."""

    def find(self, agent: str, task: str) -> Entry | None:
        """A task of an agent, if it was really sent to it."""
        entry = self.index.find(agent, task, caller=subjects.OPERATOR)
        return entry if entry is not None and entry.created else None

    def ancestors(self, entry: Entry) -> tuple[str, ...]:
        """Ids of the tasks that delegated this one, the nearest first, as the broker vouches for them."""
        found: list[str] = []
        above: Entry | None = entry
        while above is not None and above.parent is not None and above.parent[1] not in found:
            found.append(above.parent[1])
            above = self.find(*above.parent)
        return tuple(found)
