"""A task's public log, written under one claim.

Events leave at once and in order, several in flight; each carries its number. When the outcome of one is
unknown the claim is renewed, the log is read, and what is not in it is sent again. So every event is stored once,
in order, and none after the one that ends the task.
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
from weft_protocols.resources import STREAM
from weft_protocols.states import State

IN_FLIGHT: Final = 32
"""Events of one task without an acknowledgement; a handler that writes faster waits."""
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
            some (a single server does, a cluster that elects a leader does not). Then a status is acknowledged by
            what follows it, and the event that ends a task waits only for results; otherwise each event is
            acknowledged by itself, and the end waits for all before it.
        unlimited: whether the stream has no size of its own. A full stream can refuse a result and take the small
            event after it; a full disk or account refuses both. So results are treated as a status is, then.
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
        unlimited: bool = False,
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
        self._unlimited = unlimited
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
        if self._ordered and (state is State.WORKING or (entry.result and self._unlimited)):
            # What follows in this turn of the loop is acknowledged for it, too.
            if not self._held_back:
                asyncio.get_running_loop().call_soon(self._let_go)
            self._held_back.append(entry)
        else:
            self._send(entry)
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
        results_first = not self._unlimited and any(entry.result for entry in self._unacked.values())
        if not self._ordered or self._redo or results_first:
            await self.settle()
        entry = self._entry(event, label=label, extra=extra)
        self.closed = True
        self._send(entry)
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

    def _send(self, entry: _Entry) -> None:
        """Write an event that is to be acknowledged, and before it those that were held back."""
        self._held_back.append(entry)
        self._let_go()

    def _let_go(self) -> None:
        """Write what was held back. On one connection to one server the last one's acknowledgement is for all."""
        if not self._held_back:
            return
        held, self._held_back = self._held_back, []
        lines, last = self._fence.lines, held[-1]
        self._unacked.update((entry.n, entry) for entry in held)
        for entry in held:
            headers = b"".join((b"NATS/1.0\r\n", lines, entry.lines, b"\r\n"))
            try:
                if entry is last:
                    then = partial(self._answered, entry)
                    self._broker.publish_then(self.subject, entry.data, headers=headers, then=then)
                else:
                    self._broker.send(self.subject, entry.data, headers=headers)
            except BrokerError:
                self._lost(last)
                return

    def _answered(self, entry: _Entry, ack: bytes, _: bytes | None, error: WeftError | None) -> None:
        if error is None and b'"error"' in ack:
            try:
                sequence_of(ack)
            except BrokerError as refused:
                error = refused
        if isinstance(error, Unreachable | TimedOut):
            self._lost(entry)
            return
        for n in self._up_to(entry.n):
            del self._unacked[n]
        if isinstance(error, Conflict):
            self._fail(Fenced(f"a newer claim owns {self.subject}"))
        elif isinstance(error, BrokerError):
            self._fail(error)
        self._wake()

    def _lost(self, entry: _Entry) -> None:
        for n in self._up_to(entry.n):
            self._redo[n] = self._unacked.pop(n)
        self._redo[entry.n] = entry
        self._wake()

    def _up_to(self, last: int) -> list[int]:
        """Numbers of the events without an acknowledgement that one for `last` speaks for."""
        if not self._ordered:
            return [last] if last in self._unacked else []
        return [n for n in self._unacked if n <= last]

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
