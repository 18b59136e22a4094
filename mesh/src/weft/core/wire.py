"""The wire: a small subclass of the nats-py client with a fast path and a reader that stays alive.

It keeps nats-py's connecting, authentication, TLS and reconnecting, and replaces what stands between a
socket and a callback:

- messages go straight from the parser to a plain function, without a Msg object, a queue or a task;
- requests are answered through one inbox and one future each, and time out by one sweeper;
- writes of one turn of the event loop leave together, and nothing is kept across a disconnect, so that a
  write is never delivered after its caller was told that it failed;
- a late PONG or any other surprise in the reader reconnects instead of leaving a deaf connection.

The private methods it overrides are those of nats-py 2.16; `PRIVATE` lists them for the contract test.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from nats import errors as nats_errors
from nats.aio.client import Client
from nats.aio.subscription import Subscription as NatsSubscription

from weft_protocols import headers as h
from weft_protocols.errors import Backpressure, TimedOut, Unreachable

PRIVATE: Final = {
    Client: (
        "_process_msg",
        "_process_pong",
        "_read_loop",
        "_process_op_err",
        "_attempt_reconnect",
        "_send_command",
        "_close",
    ),
}
"""Methods of nats-py that this module overrides or calls although they are private."""
PRIVATE_STATE: Final = ("_subs", "_pongs", "_pongs_received", "_pings_outstanding", "_transport", "_status")
SWEEP: Final = 0.1
"""Seconds between looks for requests that timed out."""
MAX_BUFFER: Final = 32 * 1024 * 1024
"""Bytes that may wait for a stalled server before writes are refused."""

Handler = Callable[[bytes, bytes, bytes, bytes | None], None]
"""Called from the reader with subject, reply, data and raw headers. Must not block and should not raise."""


@dataclass(slots=True)
class _Waiting:
    future: asyncio.Future[tuple[bytes, bytes | None]]
    deadline: float


async def _ignore(_: object) -> None:
    """nats-py wants a callback; messages never reach it."""


class Wire(Client):
    """One connection. Use through `weft.core.broker.Broker`."""

    def __init__(self) -> None:
        super().__init__()
        self.handler_failed: Callable[[BaseException], None] = lambda _: None
        self.requests_lost: Callable[[], None] = lambda: None
        self._handlers: dict[int, Handler] = {}
        self._waiting: dict[bytes, _Waiting] = {}
        self._counter = 0
        self._reply_prefix = b""
        self._out: list[bytes] = []
        self._out_size = 0
        self._flush_scheduled = False
        self._sweeper: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()

    # What nats-py gets wrong -------------------------------------------------------------------

    async def _process_pong(self) -> None:
        """A PONG whose flush() gave up meanwhile must not end the reader."""
        if self._pongs:
            waiting = self._pongs.pop(0)
            if not waiting.done():
                waiting.set_result(True)
            self._pongs_received += 1
        self._pings_outstanding = 0

    async def _read_loop(self) -> None:
        """Reconnect when the reader ended for a reason nats-py only logs: the connection would stay deaf."""
        await super()._read_loop()
        if self.is_connected and not self.is_draining:
            await self._process_op_err(nats_errors.UnexpectedEOF())

    async def _attempt_reconnect(self) -> None:
        """Everything under way is lost with the old connection: say so at once."""
        self.drop_waiting(Unreachable("the connection to the broker was lost; the outcome is unknown"))
        await super()._attempt_reconnect()

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        handler = self._handlers.get(sid)
        if handler is None:
            await super()._process_msg(sid, subject, reply, data, headers)
            return
        self.stats["in_msgs"] += 1
        try:
            handler(subject, reply, data, headers)
        except Exception as error:  # noqa: BLE001 - one bad message must not end the reader of all
            self.handler_failed(error)

    # The fast path -----------------------------------------------------------------------------

    async def open_replies(self) -> None:
        """Subscribe the inbox of all requests. Once, after connecting."""
        self._reply_prefix = self.new_inbox().encode() + b"."
        await self.listen(self._reply_prefix.decode() + "*", self._on_reply)

    async def listen(self, subject: str, handler: Handler, *, queue: str = "") -> NatsSubscription:
        """Subscribe a plain function. The subscription survives reconnects."""
        subscription = await self.subscribe(subject, queue=queue, cb=_ignore)
        self._handlers[subscription._id] = handler
        return subscription

    def forget(self, subscription: NatsSubscription) -> None:
        """Stop handing messages of a subscription to its function."""
        self._handlers.pop(subscription._id, None)

    def post(self, subject: str, data: bytes, *, reply: bytes = b"", headers: bytes | None = None) -> None:
        """Write one message. Leaves with all others of this turn of the loop.

        Raises:
            Unreachable: not connected; nothing is kept for later.
            Backpressure: the server does not read and the buffer is full.
        """
        if not self.is_connected:
            raise Unreachable("not connected to the broker")
        if headers is None:
            command = b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), reply, len(data), data)
        else:
            size = len(headers)
            command = b"HPUB %b %b %d %d\r\n%b%b\r\n" % (
                subject.encode(), reply, size, size + len(data), headers, data,
            )  # fmt: skip
        if self._out_size > MAX_BUFFER:
            raise Backpressure("the broker does not read: too much is waiting to be written")
        self._out.append(command)
        self._out_size += len(command)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._write_out)

    def ask(
        self, subject: str, data: bytes, *, headers: bytes | None = None, timeout: float = 5.0
    ) -> asyncio.Future[tuple[bytes, bytes | None]]:
        """Write a request; the future holds (data, raw headers), or Unreachable or TimedOut."""
        self._counter += 1
        token = b"%d" % self._counter
        future: asyncio.Future[tuple[bytes, bytes | None]] = self._loop.create_future()
        self.post(subject, data, reply=self._reply_prefix + token, headers=headers)
        self._waiting[token] = _Waiting(future, self._loop.time() + timeout)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(SWEEP, self._sweep)
        return future

    @property
    def in_flight(self) -> int:
        """Requests without an answer yet."""
        return len(self._waiting)

    def drop_waiting(self, error: Exception) -> None:
        """Fail every request under way, and forget what was not written."""
        waiting, self._waiting = self._waiting, {}
        self._out.clear()
        self._out_size = 0
        for entry in waiting.values():
            if not entry.future.done():
                entry.future.set_exception(error)
                entry.future.exception()  # whoever gave up waiting must not cause a warning
        self.requests_lost()

    def _on_reply(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        entry = self._waiting.pop(subject[len(self._reply_prefix) :], None)
        if entry is None or entry.future.done():
            return
        if headers is not None and h.status(headers)[0] == 503:
            entry.future.set_exception(Unreachable("nobody serves this subject, or this identity may not use it"))
        else:
            entry.future.set_result((data, headers))

    def _write_out(self) -> None:
        self._flush_scheduled = False
        if not self._out:
            return
        out, self._out, self._out_size = self._out, [], 0
        if self.is_connected and self._transport is not None:
            self._transport.writelines(out)
            self._out_size = self._unsent()

    def _unsent(self) -> int:
        writer: Any = getattr(self._transport, "_io_writer", None)
        return int(writer.transport.get_write_buffer_size()) if writer is not None else 0

    def _sweep(self) -> None:
        self._sweeper = None
        now = self._loop.time()
        for token in [t for t, entry in self._waiting.items() if entry.deadline < now or entry.future.cancelled()]:
            entry = self._waiting.pop(token)
            if not entry.future.done():
                entry.future.set_exception(TimedOut("the broker did not answer in time; the outcome is unknown"))
                entry.future.exception()
        if self._waiting and not self.is_closed:
            self._sweeper = self._loop.call_later(SWEEP, self._sweep)
