"""A task's public log, written under one claim.

Events leave at once and in order, several in flight; each carries its number. The event that stops a task is
sent only when all before it are acknowledged, so that nothing is ever stored after a terminal event. What the
broker did not acknowledge is sent again in order; a repeated number is ignored by readers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from a2a.types import a2a_pb2 as pb

from weft.core.broker import Broker, sequence_of
from weft_protocols import a2a
from weft_protocols import headers as h
from weft_protocols.errors import BrokerError, Conflict, Fenced, TimedOut, TooLarge, Unreachable
from weft_protocols.resources import STREAM
from weft_protocols.states import State

IN_FLIGHT: Final = 32
"""Events of one task without an acknowledgement; a handler that writes faster waits."""
PATIENCE: Final = 60.0
"""Seconds a write is tried before the attempt is given up; the task is then delivered again."""


@dataclass(frozen=True, slots=True)
class _Entry:
    n: int
    data: bytes
    headers: bytes


class EventLog:
    """Writes events of one task under one claim."""

    def __init__(
        self,
        broker: Broker,
        *,
        subject: str,
        fence: bytes,
        last: int,
        content_type: str = h.PROTOBUF,
        on_failure: Callable[[BrokerError | Fenced], None],
    ) -> None:
        self.subject = subject
        self.last = last
        """Number of the last event written."""
        self.last_state = State.UNSPECIFIED
        self.closed = False
        self._broker = broker
        self._fence = fence
        self._content_type = content_type
        self._type_line = b"" if content_type == h.PROTOBUF else h.fields({h.CONTENT_TYPE: content_type})
        self._on_failure = on_failure
        self._unacked: dict[int, _Entry] = {}
        self._redo: dict[int, _Entry] = {}
        self._quiet: asyncio.Future[None] | None = None
        self._failure: BrokerError | Fenced | None = None

    async def post(self, event: pb.StreamResponse, *, state: State | None = None, extra: bytes = b"") -> int:
        """Write an event without waiting for its acknowledgement; its number. Raises Fenced after a newer claim."""
        entry = self._entry(event, state=state, extra=extra)
        if len(self._unacked) >= IN_FLIGHT or self._redo:
            await self.settle()
        self._raise_failure()
        self._unacked[entry.n] = entry
        try:
            future = self._broker.publish_once(self.subject, entry.data, headers=entry.headers)
        except (Unreachable, BrokerError):
            self._lost(entry)
        else:
            future.add_done_callback(lambda done: self._answered(entry, done))
        return entry.n

    async def settle(self) -> None:
        """Return when every event so far is stored."""
        while True:
            self._raise_failure()
            if self._unacked:
                self._quiet = asyncio.get_running_loop().create_future()
                await self._quiet
            elif self._redo:
                await self._send_again()
            else:
                return

    async def finish(self, event: pb.StreamResponse, *, label: str, extra: bytes = b"") -> int:
        """Write the event that ends the task, after all others; its stream sequence. Nothing follows it."""
        await self.settle()
        entry = self._entry(event, state=None, extra=extra + h.fields({h.STATE: label}))
        self.closed = True
        own_id = h.fields({h.DEDUPLICATION_ID: f"{self.subject}:{entry.n}"})
        lines = [entry.headers[:-2], own_id]
        deadline = asyncio.get_running_loop().time() + PATIENCE
        attempt = 0
        while True:
            try:
                ack, _ = await self._broker.publish_once(self.subject, entry.data, headers=b"".join((*lines, b"\r\n")))
                sequence = sequence_of(ack)
                if len(lines) == 2 and b'"duplicate"' in ack and not await self._is_last(entry.n):
                    # The id was used by somebody else; the fence alone has to do.
                    lines.pop()
                    continue
                return sequence
            except Conflict as error:
                raise Fenced(f"a newer claim owns {self.subject}") from error
            except (Unreachable, TimedOut) as error:
                await self._broker.before_retry(attempt, deadline, error)
                attempt += 1

    async def _is_last(self, n: int) -> bool:
        stored = await self._broker.last(STREAM, self.subject)
        return stored is not None and int(h.get(stored.headers, b"Weft-Event") or 0) >= n

    def _entry(self, event: pb.StreamResponse, *, state: State | None, extra: bytes) -> _Entry:
        if self.closed:
            raise Fenced("the task has ended; nothing more can be written to it")
        data = a2a.encode(event, self._content_type)
        if len(data) + 2048 > self._broker.max_payload:
            raise TooLarge(f"an event has {len(data)} bytes and the broker takes {self._broker.max_payload}")
        self.last += 1
        lines = b"Weft-Event: %d\r\n" % self.last
        if state is not None:
            self.last_state = state
            lines += b"Weft-State: %b\r\n" % state.label.encode()
        return _Entry(self.last, data, b"".join((b"NATS/1.0\r\n", self._fence, lines, self._type_line, extra, b"\r\n")))

    def _answered(self, entry: _Entry, done: asyncio.Future[tuple[bytes, bytes | None]]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            try:
                sequence_of(done.result()[0])
            except BrokerError as refused:
                error = refused
        if isinstance(error, Unreachable | TimedOut):
            self._lost(entry)
            return
        self._unacked.pop(entry.n, None)
        if isinstance(error, Conflict):
            self._fail(Fenced(f"a newer claim owns {self.subject}"))
        elif isinstance(error, BrokerError):
            self._fail(error)
        self._wake()

    def _lost(self, entry: _Entry) -> None:
        self._unacked.pop(entry.n, None)
        self._redo[entry.n] = entry
        self._wake()

    def _wake(self) -> None:
        if self._quiet is not None and not self._quiet.done() and (not self._unacked or self._failure):
            self._quiet.set_result(None)

    def _fail(self, error: BrokerError | Fenced) -> None:
        if self._failure is None:
            self._failure = error
            self._on_failure(error)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _send_again(self) -> None:
        for n in sorted(self._redo):
            entry = self._redo[n]
            try:
                await self._broker.publish(self.subject, entry.data, headers=entry.headers, timeout=PATIENCE)
            except Conflict as error:
                failure = Fenced(f"a newer claim owns {self.subject}")
                self._fail(failure)
                raise failure from error
            del self._redo[n]
