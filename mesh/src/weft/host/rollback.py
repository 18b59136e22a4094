"""What a task has registered to be undone, as it is stored, and how it ends once that is decided."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import msgpack

from weft.host.journal import Journal
from weft_protocols import records
from weft_protocols.states import State


@dataclass(frozen=True, slots=True)
class Undo:
    """One compensation."""

    key: str
    function: str
    """`module:name`."""
    arguments: bytes


@dataclass(frozen=True, slots=True)
class End:
    """How a task ends."""

    state: State
    text: str
    error: str = ""
    """Of its dead letter; empty for none."""
    reason: str = ""
    """Of an A2A error; empty for none."""


@dataclass(slots=True)
class Rollback:
    """What a task would have undone, in the order of its effects, and how it ends once that is decided."""

    undos: list[Undo] = field(default_factory=list)
    end: End | None = None
    loaded: bool = False
    """Whether what earlier attempts registered is in it."""
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def store(self, journal: Journal) -> None:
        """Write the record as a whole."""
        end = self.end
        told = {
            "undos": [[one.key, one.function, one.arguments] for one in self.undos],
            "end": None if end is None else [int(end.state), end.text, end.error, end.reason],
        }
        await journal.replace(records.ROLLBACK_KEY, bytes(msgpack.packb(told)))

    def fill(self, data: bytes) -> None:
        """Take over a stored record."""
        told = msgpack.unpackb(data)
        self.undos = [Undo(*one) for one in told["undos"]]
        if (end := told["end"]) is not None:
            self.end = End(State(end[0]), *end[1:])
