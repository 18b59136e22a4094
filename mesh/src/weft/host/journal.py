"""A task's private journal: records written under its claim, read back when the task runs again.

A record is fenced by the claim, and its `Nats-Msg-Id` makes the broker refuse a second one for the same key
within the duplicate window; a worker that takes over reads before it runs. So a key has one record.
"""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Final

from weft.core.broker import Broker, Stored, sequence_of
from weft.host import held
from weft.host.fence import Fence
from weft_protocols import headers as h
from weft_protocols import subjects
from weft_protocols.errors import Conflict, Fenced, InvalidName, TimedOut, TooLarge, Unreachable
from weft_protocols.resources import STREAM

PATIENCE: Final = 60.0
ORDINAL: Final = "#"
"""Between a key and its ordinal."""
NESTED: Final = " > "
"""Between a step's key and those of the steps inside it."""
_SCOPE: ContextVar[str] = ContextVar("weft_step_scope", default="")


class Journal:
    """Records of one task under one claim."""

    def __init__(self, broker: Broker, *, agent: str, task_id: str, fence: Fence, fresh: bool) -> None:
        self._broker = broker
        self._agent = agent
        self._task = task_id
        self._fence = fence
        self.fresh = fresh
        """First attempt: there can be no records yet, so none are looked for."""
        self._ordinals: dict[str, int] = {}
        self.closed = False

    def key(self, name: str, *, explicit: bool = False) -> str:
        """The key for a step: the explicit name, or the name and its ordinal within the surrounding step.

        Raises:
            InvalidName: the name could be taken for a key of the host's own, or for an ordinal or a nested step.
        """
        if not name or name.startswith("_") or ORDINAL in name or NESTED in name:
            raise InvalidName(
                f"step key {name!r} is not possible: it must not be empty, begin with _, or have {ORDINAL!r} or "
                f"{NESTED!r} in it"
            )
        return self._scoped(name, count=not explicit)

    def own_key(self, name: str) -> str:
        """A key of the host's own, with its ordinal within the surrounding step."""
        return self._scoped(name, count=True)

    @property
    def used(self) -> int:
        """How many keys this attempt has made: what would be done again if it gave up now."""
        return sum(self._ordinals.values())

    def _scoped(self, name: str, *, count: bool) -> str:
        held.check()
        surrounding = _SCOPE.get()
        base = f"{surrounding}{NESTED}{name}" if surrounding else name
        if not count:
            return base
        ordinal = self._ordinals.get(base, 0)
        self._ordinals[base] = ordinal + 1
        return base if ordinal == 0 else f"{base}{ORDINAL}{ordinal}"

    def rewind(self, step: str) -> None:
        """A step's body is tried again: the steps inside it have the keys they had, and records to be found."""
        self.fresh = False
        for name in [name for name in self._ordinals if name.startswith(f"{step}{NESTED}")]:
            del self._ordinals[name]

    async def read(self, key: str) -> Stored | None:
        """The record of a key, or None."""
        if self.fresh:
            return None
        return await self._broker.last(STREAM, self._subject(key))

    async def write(self, key: str, data: bytes) -> tuple[int, bytes]:
        """Write a record and return its sequence and content: the first writer's, whoever that was.

        Raises:
            Fenced: a newer claim owns the task.
            TooLarge: the broker does not take that much in one message.
        """
        if self.closed:
            raise Fenced("the task has ended; nothing more can be written to it")
        subject = self._subject(key)
        own_id = h.fields({h.DEDUPLICATION_ID: f"{subject}:step"})
        return await self._publish(subject, data, own_id)

    async def replace(self, key: str, data: bytes) -> int:
        """Write a record whose last version counts; its sequence."""
        sequence, _ = await self._publish(self._subject(key), data, b"")
        return sequence

    async def _publish(self, subject: str, data: bytes, own_id: bytes) -> tuple[int, bytes]:
        if len(data) + 2048 > self._broker.max_payload:
            raise TooLarge(f"a record of the task has {len(data)} bytes; the broker takes {self._broker.max_payload}")
        deadline = asyncio.get_running_loop().time() + PATIENCE
        attempt = 0
        while True:
            used = self._fence.lines
            try:
                ack, _ = await self._broker.publish_once(subject, data, headers=h.block(used, own_id))
                sequence = sequence_of(ack)
            except Conflict:
                await self._fence.lost(used)
                continue
            except (Unreachable, TimedOut) as error:
                await self._broker.before_retry(attempt, deadline, error)
                attempt += 1
                continue
            if b'"duplicate"' not in ack:
                return sequence, data
            winner = await self._broker.last(STREAM, subject)
            if winner is not None:
                return winner.seq, winner.data
            # The id was used by somebody else's message; the fence alone has to do.
            own_id = b""

    def _subject(self, key: str) -> str:
        return subjects.step(self._agent, self._task, subjects.step_token(key))


class scope:
    """Keys of steps inside begin with this step's key."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __enter__(self) -> None:
        self._token = _SCOPE.set(self._key)

    def __exit__(self, *_: object) -> None:
        _SCOPE.reset(self._token)
