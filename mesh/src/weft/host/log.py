"""A task's public log, written under one claim.

Events that are written in one turn of the loop are stored as one message, all or none; several messages may be in
flight. When the outcome of one is unknown the claim is renewed, the log is read, and what is not in it is sent
again. So every event is stored once, in order, and none after the one that ends the task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from a2a.types import a2a_pb2 as pb

from weft.core.broker import Broker, sequence_of
from weft.host import takeover
from weft.host.fence import Fence
from weft_protocols import a2a
from weft_protocols import headers as h
from weft_protocols.errors import BrokerError, Conflict, Fenced, TimedOut, TooLarge, Unreachable, WeftError
from weft_protocols.events import group
from weft_protocols.resources import STREAM
from weft_protocols.states import State

IN_FLIGHT: Final = 32
"""Events of one task without an acknowledgement; a handler that writes faster waits."""
GROUP: Final = 128 * 1024
"""Bytes of events that are stored as one message; larger ones go by themselves."""
PATIENCE: Final = 60.0
"""Seconds a write is tried before the attempt is given up; the task is then delivered again."""


@dataclass(slots=True)
class _Entry:
    n: int
    data: bytes
    lines: bytes
    """Header lines besides the condition."""
    result: bool = False
    """Whether it carries a part of the result, and not only how the task stands."""


class EventLog:
    """Writes events of one task under one claim.

    Args:
        ordered: whether the broker stores one connection's messages in the order they were sent, even if it loses
            some (a single server does, a cluster that elects a leader does not). Then the event that ends a task
            waits only for results that were written before; otherwise for everything.
        on_failure: told once when nothing more can be written, before anybody awaits it.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        subject: str,
        fence: Fence,
        content_type: str = h.PROTOBUF,
        ordered: bool = True,
        on_failure: Callable[[BrokerError | Fenced], None],
    ) -> None:
        self.subject = subject
        self.last = 0
        """Number of the last event written."""
        self.last_state = State.UNSPECIFIED
        self.closed = False
        self._broker = broker
        self._fence = fence
        self._content_type = content_type
        self._type_line = b"" if content_type == h.PROTOBUF else h.fields({h.CONTENT_TYPE: content_type})
        self._ordered = ordered
        self._on_failure = on_failure
        self._unacked: dict[int, _Entry] = {}
        self._redo: dict[int, _Entry] = {}
        self._held_back: list[_Entry] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._failure: BrokerError | Fenced | None = None

    async def post(self, event: pb.StreamResponse, *, state: State | None = None, extra: bytes = b"") -> int:
        """Write an event without waiting for its acknowledgement; its number. Raises Fenced after a newer claim."""
        if len(self._unacked) + len(self._held_back) >= IN_FLIGHT or self._redo:
            await self.settle()
        entry = self._entry(event, label=state.label if state is not None else "", extra=extra)
        entry.result = state is None
        if state is not None:
            self.last_state = state
        if not self._held_back:
            asyncio.get_running_loop().call_soon(self._let_go)
        self._held_back.append(entry)
        return entry.n

    async def settle(self) -> None:
        """Return when every event so far is stored."""
        while True:
            if self._failure is not None:
                raise self._failure
            self._let_go()
            if self._unacked:
                quiet: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiting.append(quiet)
                await quiet
            elif self._redo:
                async with self._fence.renewing:
                    await self._send_again()
            else:
                return

    async def finish(self, event: pb.StreamResponse, *, label: str, extra: bytes = b"") -> None:
        """Write the event that ends the task and return when it is stored. Nothing follows it."""
        # A full stream takes a small event after it refused a result: they go together, or one after the other.
        results_first = any(entry.result for entry in self._unacked.values()) or _size(self._held_back) > GROUP // 2
        if results_first or self._redo or (self._unacked and not self._ordered):
            await self.settle()
        entry = self._entry(event, label=label, extra=extra)
        self.closed = True
        self._held_back.append(entry)
        await self.settle()

    def _entry(self, event: pb.StreamResponse, *, label: str, extra: bytes) -> _Entry:
        if self.closed:
            raise Fenced("the task has ended; nothing more can be written to it")
        if self._failure is not None:
            raise self._failure
        data = a2a.encode(event, self._content_type)
        if len(data) + 2048 > self._broker.max_payload:
            raise TooLarge(f"an event has {len(data)} bytes and the broker takes {self._broker.max_payload}")
        self.last += 1
        state = b"Weft-State: %b\r\n" % label.encode() if label else b""
        return _Entry(self.last, data, b"".join((b"Weft-Event: %d\r\n" % self.last, state, self._type_line, extra)))

    def _let_go(self) -> None:
        """Write what was held back: one message, or several where it is large."""
        held, self._held_back = self._held_back, []
        self._unacked.update((entry.n, entry) for entry in held)
        while held:
            count = 1
            while count < len(held) and _size(held[: count + 1]) <= GROUP:
                count += 1
            self._write(held[:count])
            del held[:count]

    def _write(self, entries: list[_Entry]) -> None:
        if len(entries) == 1:
            lines, data = entries[0].lines, entries[0].data
        else:
            lines, data = group([(entry.lines, entry.data) for entry in entries])
        headers = b"".join((b"NATS/1.0\r\n", self._fence.lines, lines, b"\r\n"))
        try:
            self._broker.publish_then(self.subject, data, headers=headers, then=partial(self._answered, entries))
        except BrokerError:
            self._lost(entries)

    def _answered(self, entries: list[_Entry], ack: bytes, _: bytes | None, error: WeftError | None) -> None:
        if error is None and b'"error"' in ack:
            try:
                sequence_of(ack)
            except BrokerError as refused:
                error = refused
        if isinstance(error, Unreachable | TimedOut):
            self._lost(entries)
            return
        for entry in entries:
            self._unacked.pop(entry.n, None)
        if isinstance(error, Conflict):
            self._fail(Fenced(f"a newer claim owns {self.subject}"))
        elif isinstance(error, BrokerError):
            self._fail(error)
        self._wake()

    def _lost(self, entries: list[_Entry]) -> None:
        for entry in entries:
            self._unacked.pop(entry.n, None)
            self._redo[entry.n] = entry
        self._wake()

    def _wake(self) -> None:
        if self._waiting and (not self._unacked or self._failure):
            waiting, self._waiting = self._waiting, []
            for quiet in waiting:
                if not quiet.done():
                    quiet.set_result(None)

    def _fail(self, error: BrokerError | Fenced) -> None:
        if self._failure is None:
            self._failure = error
            self._on_failure(error)

    async def _send_again(self) -> None:
        """Store what is not in the log, each event expecting exactly the one before it."""
        deadline = asyncio.get_running_loop().time() + PATIENCE
        attempt = 0
        while self._redo:
            try:
                stored = await self._broker.last(STREAM, self.subject)
                # After the read, so that what is written next stands on it only if nobody claimed meanwhile.
                await self._fence.renew()
                last = takeover.event_number(stored)
                self._redo = {n: entry for n, entry in self._redo.items() if n > last}
                expected = stored.seq if stored is not None else 0
                for n in sorted(self._redo):
                    entry = self._redo[n]
                    headers = h.block(h.fields({h.EXPECTED_SEQUENCE: str(expected)}), entry.lines)
                    ack, _ = await self._broker.publish_once(self.subject, entry.data, headers=headers)
                    expected = sequence_of(ack)
                    del self._redo[n]
            except Fenced as error:
                self._fail(error)
                raise
            except (Conflict, Unreachable, TimedOut) as error:
                await self._broker.before_retry(attempt, deadline, error)
                attempt += 1


def _size(entries: list[_Entry]) -> int:
    """Bytes of a group, about."""
    return sum(len(entry.data) + len(entry.lines) + 32 for entry in entries)
