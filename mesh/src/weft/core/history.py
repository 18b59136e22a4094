"""Reading streams without a consumer: batched direct gets, many messages an answer.

Nothing of it is state in the broker: a read that got lost is asked again, after a reconnect as after a timeout.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Self

from weft.core.broker import Broker, Stored, Subscription
from weft_protocols import headers as h
from weft_protocols.accounts import DIRECT_GET
from weft_protocols.errors import ApiError, TimedOut, TooLarge, Unreachable

COUNT: Final = 1000
"""Messages asked for at a time."""
SIZE: Final = 4 * 1024 * 1024
"""Bytes asked for at a time; the server drops connections that let 64 MB pile up."""
WHOLE: Final = 64 * 1024 * 1024
"""Bytes that are read as a whole at most."""
ATTEMPT: Final = 5.0
"""Seconds one batch may take before it is asked again."""
PATIENCE: Final = 10.0
"""Seconds a read is tried."""
_EMPTY: Final = (204, 404)
_STAMP: Final = b"\r\nNats-Stream: "
"""Begin of what the broker appends to a stored message's headers: stream, subject, sequence, time."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Messages in stream order, and whether there are more."""

    messages: list[Stored]
    more: bool


@dataclass(slots=True)
class _Read:
    done: asyncio.Future[bool]
    """Whether there is more to read."""
    single: bool
    """Whether one message is the whole answer."""
    messages: list[Stored] = field(default_factory=list)


class StreamReader:
    """Reads of one connection, any number at once."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._inbox = broker.new_inbox()
        self._reads: dict[bytes, _Read] = {}
        self._count = 0
        self._subscription: Subscription | None = None
        self._forget = broker.on_lost(self._lost)

    async def open(self) -> Self:
        """Listen for answers. Once, before the first read."""
        self._subscription = await self._broker.subscribe_raw(f"{self._inbox}.*", self._on_message)
        return self

    async def close(self) -> None:
        """Stop listening; reads under way fail."""
        self._lost()
        self._forget()
        if self._subscription is not None:
            await self._subscription.close()

    async def batch(self, stream: str, subject: str, *, start: int = 1, count: int = COUNT, size: int = SIZE) -> Batch:
        """Messages of a subject or pattern from sequence `start` on: at most `count`, about `size` bytes.

        A subject without wildcards is found at once from sequence 1; patterns are cheap near the messages they match.

        Raises:
            Unreachable, TimedOut: no complete answer within `PATIENCE` seconds.
            ApiError: the stream does not exist or refuses.
        """
        body = {"seq": start, "next_by_subj": subject, "batch": count, "max_bytes": size}
        return await self._read(stream, body, single=False)

    async def since(self, stream: str, subject: str, *, at: float) -> int:
        """Sequence of the first message of a pattern that was stored at `at` (unix seconds) or later; 0 for none.

        Raises what `batch` raises.
        """
        body = {"start_time": datetime.fromtimestamp(at, UTC).isoformat(), "next_by_subj": subject, "batch": 1}
        found = await self._read(stream, body, single=False)
        return found.messages[0].seq if found.messages else 0

    async def all(self, stream: str, subject: str, *, start: int = 1) -> list[Stored]:
        """Every message of a subject from sequence `start` on, to the end of the stream as it is now.

        Raises TooLarge if they have more than `WHOLE` bytes, and what `batch` raises.
        """
        found: list[Stored] = []
        size = 0
        while True:
            batch = await self.batch(stream, subject, start=start)
            found += batch.messages
            size += sum(len(one.data) for one in batch.messages)
            if size > WHOLE:
                raise TooLarge(f"{subject} has more than {WHOLE} bytes and cannot be read as a whole")
            if not batch.more or not batch.messages:
                return found
            start = batch.messages[-1].seq + 1

    async def message(self, stream: str, seq: int) -> Stored | None:
        """The message with a sequence; None if it is gone. Raises what `batch` raises."""
        found = await self._read(stream, {"seq": seq}, single=True)
        return found.messages[0] if found.messages else None

    async def last(self, stream: str, subject: str) -> Stored | None:
        """The last message of an exact subject; None if there is none. Raises what `batch` raises."""
        found = await self._read(stream, {"last_by_subj": subject}, single=True)
        return found.messages[0] if found.messages else None

    async def lasts(self, stream: str, subjects: Sequence[str]) -> list[Stored]:
        """The last message of each exact subject that has one, in stream order, as of one moment for every `COUNT`.

        Raises what `batch` raises.
        """
        found: list[Stored] = []
        for begin in range(0, len(subjects), COUNT):
            body = {"multi_last": subjects[begin : begin + COUNT], "batch": COUNT}
            batch = await self._read(stream, body, single=False)
            found += batch.messages
        return found

    async def _read(self, stream: str, body: dict[str, Any], *, single: bool) -> Batch:
        deadline = asyncio.get_running_loop().time() + PATIENCE
        request = json.dumps(body).encode()
        attempt = 0
        while True:
            try:
                return await self._ask(stream, request, single=single)
            except (Unreachable, TimedOut) as error:
                await self._broker.before_retry(attempt, deadline, error)
                attempt += 1

    async def _ask(self, stream: str, request: bytes, *, single: bool) -> Batch:
        self._count += 1
        key = b"%d" % self._count
        read = _Read(asyncio.get_running_loop().create_future(), single)
        self._reads[key] = read
        try:
            self._broker.send(f"{DIRECT_GET}.{stream}", request, reply=f"{self._inbox}.{self._count}")
            async with asyncio.timeout(ATTEMPT):
                return Batch(read.messages, await read.done)
        except TimeoutError:
            raise TimedOut(f"a read of stream {stream} got no complete answer within {ATTEMPT:g} s") from None
        finally:
            del self._reads[key]

    def _on_message(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        read = self._reads.get(bytes(subject).rpartition(b".")[2])
        if read is None or read.done.done() or headers is None:
            return
        # Writers choose all headers but those the broker appends, and even the status in the first line.
        stamp = headers.rfind(_STAMP)
        if stamp >= 0:
            _, _, name, seq, time, *_ = headers[stamp:].split(b"\r\n")
            seq, time = seq[15:], time[17:]  # behind "Nats-Sequence: " and "Nats-Time-Stamp: "
            read.messages.append(Stored(name[14:].decode(), int(seq), bytes(headers), bytes(data), time.decode()))
            if read.single:
                read.done.set_result(False)
            return
        code, text = h.status(headers)
        if code == 503:
            read.done.set_exception(Unreachable("the stream cannot be read now: nobody answers for it"))
        elif code not in _EMPTY:
            read.done.set_exception(ApiError(f"direct get failed: {code} {text}", code=code))
        else:
            self._ended(read, headers, code)

    def _ended(self, read: _Read, headers: bytes, code: int) -> None:
        """The end of a batch names its last sequence: what does not end there is not whole."""
        last = int(h.get(headers, b"Nats-Last-Sequence") or 0)
        if last and (not read.messages or read.messages[-1].seq != last):
            read.done.set_exception(TimedOut("part of an answer was lost"))
        else:
            pending = int(h.get(headers, b"Nats-Num-Pending") or 0)
            read.done.set_result(code != 404 and pending > 0)

    def _lost(self) -> None:
        for read in self._reads.values():
            if not read.done.done():
                read.done.set_exception(Unreachable("the connection was lost while reading"))
                read.done.exception()
