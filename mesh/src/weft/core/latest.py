"""Records of a stream of which the last one of each subject holds: read, written conditionally, and followed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from weft_protocols import headers as h
from weft_protocols.errors import BrokerError

if TYPE_CHECKING:
    from weft.core.broker import Broker

log = logging.getLogger("weft.broker")

LOOK: Final = 30.0
"""Seconds between looks at everything, for what a lost connection did not deliver."""


@dataclass(frozen=True, slots=True)
class Record:
    """The last message of a subject."""

    key: str
    """What is after the prefix in its subject."""
    seq: int
    data: bytes
    """Empty where it was removed."""


class Latest:
    """The records of one prefix.

    Args:
        broker: a connection of account MESH.
        stream: its stream.
        prefix: of their subjects, without a dot at the end.
    """

    def __init__(self, broker: Broker, stream: str, prefix: str) -> None:
        self._broker = broker
        self._stream = stream
        self._prefix = prefix

    async def get(self, key: str) -> Record | None:
        """The record of a key, None if there is none or it was removed."""
        found = await self._broker.last(self._stream, f"{self._prefix}.{key}")
        return None if found is None or not found.data else Record(key, found.seq, found.data)

    async def all(self) -> dict[str, Record]:
        """Every record that was not removed, by key."""
        body: dict[str, Any] = {"subjects_filter": f"{self._prefix}.*"}
        info = await self._broker.api(f"STREAM.INFO.{self._stream}", body)
        made: dict[str, Record] = {}
        for subject in sorted(info["state"].get("subjects") or {}):
            record = await self.get(subject.removeprefix(f"{self._prefix}."))
            if record is not None:
                made[record.key] = record
        return made

    async def last_sequence(self, key: str) -> int:
        """Sequence of the last message of a key, also of one that removed it; 0 if there is none."""
        found = await self._broker.last(self._stream, f"{self._prefix}.{key}")
        return found.seq if found is not None else 0

    async def put(self, key: str, data: bytes, *, after: int | None = None) -> int:
        """Write a record; its sequence. With `after`, only if the last one has that sequence (0: there is none).

        Raises Conflict if it has not, and what `Broker.publish` raises.
        """
        lines = h.block(h.fields({h.EXPECTED_SEQUENCE: str(after)})) if after is not None else None
        return await self._broker.publish(f"{self._prefix}.{key}", data, headers=lines)

    async def remove(self, key: str) -> None:
        """Write that there is no such record any more."""
        await self._broker.publish(f"{self._prefix}.{key}", b"")


class Follower:
    """Keeps what `look` makes of the records up to date.

    Args:
        look: reads everything and takes it over; called once at a time, again after changes and every `LOOK` s.
    """

    def __init__(self, broker: Broker, republished: str, look: Callable[[], Any]) -> None:
        self._broker = broker
        self._republished = republished
        self._look = look
        self._news = asyncio.Event()

    async def run(self, ready: Callable[[], None]) -> None:
        """Look, say `ready`, and go on until cancelled."""
        undo = self._broker.on_reconnect(self._news.set)
        subscription = await self._broker.subscribe(f"{self._republished}.>", lambda _: self._news.set())
        try:
            first = True
            while True:
                self._news.clear()
                try:
                    await self._look()
                    if first:
                        ready()
                        first = False
                except BrokerError as error:
                    log.warning("what %s holds cannot be read now: %s", self._republished, error)
                try:
                    async with asyncio.timeout(LOOK if not first else 1.0):
                        await self._news.wait()
                except TimeoutError:
                    continue
        finally:
            undo()
            await subscription.close()
