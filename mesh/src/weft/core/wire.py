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
from collections.abc import Awaitable, Callable
from typing import Any, Final

from nats import errors as nats_errors
from nats.aio.client import Client
from nats.aio.subscription import Subscription as NatsSubscription
from nats.aio.transport import TcpTransport
from nats.protocol.parser import AWAITING_CONTROL_LINE, PERMISSIONS_ERR, STALE_CONNECTION, Parser

from weft_protocols.errors import Backpressure, BrokerError, InvalidName, TimedOut, TooLarge, Unreachable, WeftError

PRIVATE: Final = {
    Client: (
        "_process_msg",
        "_process_pong",
        "_read_loop",
        "_process_op_err",
        "_process_err",
        "_attempt_reconnect",
        "_connect_to_server",
        "_process_connect_init",
        "_send_ping",
        "_close",
    ),
    Parser: ("parse", "reset"),
}
"""Methods of nats-py that this module overrides or calls although they are private."""
PRIVATE_STATE: Final = {
    Client: (
        "_subs", "_pongs", "_pongs_received", "_pings_outstanding", "_pending", "_pending_data_size", "_max_payload",
        "_transport", "_ps", "_error_cb", "_reading_task", "_ping_interval_task", "_flusher_task",
        "_reconnection_task",
    ),
    Parser: ("buf", "state"),
    TcpTransport: ("_io_writer",),
}  # fmt: skip
"""Attributes of their instances that this module reads or sets."""
SWEEP: Final = 0.1
"""Seconds between looks for requests that timed out."""
MAX_BUFFER: Final = 32 * 1024 * 1024
"""Bytes that may wait for a stalled server before writes are refused."""

Handler = Callable[[bytes, bytes, bytes, bytes | None], None]
"""Called from the reader with subject, reply, data and raw headers. Must not block and should not raise."""


Answered = Callable[[bytes, bytes | None, WeftError | None], None]
"""Called from the reader with the data and raw headers of an answer, or with an error."""
_NO_RESPONDERS: Final = b"NATS/1.0 503"
REFUSALS: Final = ("authorization violation", "authentication expired", "authentication revoked")
"""Words of the server's errors, in lower case, that mean: this identity is not known, or not any more."""


async def _ignore(_: object) -> None:
    """nats-py wants a callback; messages never reach it."""


class FastParser(Parser):
    """nats-py's parser with a shortcut for messages to plain functions.

    Whole ones are cut out of a read without regular expressions, copies of the rest or coroutines. Everything else
    goes to nats-py.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._tail = b""
        super().__init__(wire)

    def reset(self) -> None:
        """Forget a message that has not arrived whole."""
        super().reset()
        self._tail = b""

    async def parse(self, data: bytes = b"") -> None:
        """Take what was read from the socket."""
        if self.buf or self.state != AWAITING_CONTROL_LINE:
            await super().parse(data)
            return
        if self._tail:
            data = self._tail + data
        used = self._messages(data)
        rest = data[used:] if used else data
        begins = b"HMSG ".startswith(rest) or b"MSG ".startswith(rest)
        if begins or (rest.startswith((b"MSG ", b"HMSG ")) and not self._foreign(rest)):
            self._tail = rest
        else:
            self._tail = b""
            await super().parse(rest)

    def _foreign(self, rest: bytes) -> bool:
        """Whether a message is for a subscription of nats-py's own, so that nats-py has to take it."""
        head = rest[: rest.find(b"\r\n")].split(b" ", 3) if b"\r\n" in rest else []
        return len(head) > 2 and head[2].isdigit() and self._wire.handler_of(int(head[2])) is None

    def _messages(self, data: bytes) -> int:
        """Hand over the whole messages at the start of `data`; how many bytes they took."""
        at, end, find = 0, len(data), data.find
        while at < end:
            with_headers = data.startswith(b"HMSG ", at)
            if not with_headers and not data.startswith(b"MSG ", at):
                break
            line_end = find(b"\r\n", at)
            if line_end < 0:
                break
            fields = data[at:line_end].split(b" ")
            handler = self._wire.handler_of(int(fields[2]))
            start = line_end + 2
            stop = start + int(fields[-1])
            if handler is None or stop + 2 > end:
                break
            has_reply = len(fields) == (6 if with_headers else 5)
            body = start + int(fields[-2]) if with_headers else start
            self._wire.hand(
                handler,
                fields[1],
                fields[3] if has_reply else b"",
                data=data[body:stop],
                headers=data[start:body] if with_headers else None,
            )
            at = stop + 2
        return at


class Wire(Client):
    """One connection. Use through `weft.core.broker.Broker`."""

    def __init__(self) -> None:
        super().__init__()
        self.handler_failed: Callable[[BaseException], None] = lambda _: None
        self.requests_lost: Callable[[], None] = lambda: None
        self.answered: Callable[[], None] | None = None
        """Called when a request was settled, while somebody waits for the window to have room."""
        self.failure: BrokerError | None = None
        """Why the connection ended for good, where it was not asked to."""
        self._handlers: dict[int, Handler] = {}
        self._waiting: dict[bytes, tuple[Answered, float]] = {}
        self._ps = FastParser(self)
        self._counter = 0
        self._reply_prefix = b""
        self._out: list[bytes] = []
        self._out_size = 0
        self._flush_scheduled = False
        self._sweeper: asyncio.TimerHandle | None = None
        self._spared = False
        self._cancels = 0
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
        reader = asyncio.current_task()
        cancelled = reader is not None and reader.cancelling() > 0
        if self.is_connected and not self.is_draining and not cancelled:
            await self._process_op_err(nats_errors.UnexpectedEOF())

    async def flush(self, timeout: float = 10.0) -> None:
        """Return when the server has answered a PING. `wait_for`, which nats-py uses, can lose a cancellation."""
        if self.is_closed:
            raise nats_errors.ConnectionClosedError
        pong: asyncio.Future[bool] = self._loop.create_future()
        try:
            await self._send_ping(pong)
            async with asyncio.timeout(timeout):
                await pong
        except TimeoutError:
            raise nats_errors.FlushTimeoutError from None
        except RuntimeError as error:
            raise Unreachable(f"the connection to the broker is closed: {error}") from error

    async def _process_err(self, err_msg: str) -> None:
        """Of the server's errors only a refused identity ends the connection for good, as nats-py does for all."""
        if any(words in err_msg for words in (*REFUSALS, STALE_CONNECTION, PERMISSIONS_ERR)):
            await super()._process_err(err_msg)
            return
        error_cb: Callable[[Exception], Awaitable[None]] = self._error_cb
        await error_cb(nats_errors.Error(f"nats: {err_msg}"))

    async def _connect_to_server(self, s: Any) -> None:
        """Leave nothing of an attempt that failed halfway: nats-py forgets its socket and its tasks."""
        for task in (self._reading_task, self._ping_interval_task, self._flusher_task):
            if task is not None:
                task.cancel()
        self._abort()
        await super()._connect_to_server(s)
        self._check_cancelled()

    async def _process_connect_init(self) -> None:
        await super()._process_connect_init()
        self._check_cancelled()

    def _check_cancelled(self) -> None:
        """Repeat a cancellation that came together with what was waited for, and that `wait_for` lost."""
        task = asyncio.current_task()
        if task is not None and task.cancelling() > self._cancels:
            raise asyncio.CancelledError

    async def connect(self, *args: Any, **options: Any) -> None:
        """Connect, as nats-py does."""
        task = asyncio.current_task()
        self._cancels = task.cancelling() if task is not None else 0
        await super().connect(*args, **options)

    async def _attempt_reconnect(self) -> None:
        """Everything under way is lost with the old connection: say so at once."""
        self.drop_waiting(Unreachable("the connection to the broker was lost; the outcome is unknown"))
        self._abort()
        self._cancels = 0
        try:
            await super()._attempt_reconnect()
        except BrokerError:
            # The identity is refused from now on, or this connection was closed while it tried.
            if not self.is_closed:
                self._reconnection_task = None
                await self._close(Client.CLOSED, True)

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        """Close without waiting for a server that does not read: whoever wants that flushes first."""
        if not self.is_closed:
            self._pending = []
            self._pending_data_size = 0
            self._abort()
        await super()._close(status, do_cbs)

    def _abort(self) -> None:
        writer: Any = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        handler = self._handlers.get(sid)
        if handler is None:
            await super()._process_msg(sid, subject, reply, data, headers)
            return
        self.hand(handler, subject, reply, data=data, headers=headers)

    def handler_of(self, sid: int) -> Handler | None:
        """The function a subscription's messages go to."""
        return self._handlers.get(sid)

    def hand(self, handler: Handler, subject: bytes, reply: bytes, *, data: bytes, headers: bytes | None) -> None:
        """Call a handler with a message; one bad message must not end the reader of all."""
        try:
            handler(subject, reply, data, headers)
        except Exception as error:  # noqa: BLE001 - reported, and the reader goes on
            self.handler_failed(error)

    # The fast path -----------------------------------------------------------------------------

    async def open_replies(self) -> None:
        """Subscribe the inbox of all requests. Once, after connecting."""
        self._reply_prefix = self.new_inbox().encode() + b"."
        await self.listen(self._reply_prefix.decode() + "*", self._on_reply)

    async def listen(self, subject: str, handler: Handler, *, queue: str = "") -> NatsSubscription:
        """Subscribe a plain function. The subscription survives reconnects.

        Raises:
            Unreachable: the connection is closed.
            InvalidName: the subject or the queue is none.
        """
        try:
            subscription = await self.subscribe(subject, queue=queue, cb=_ignore)
        except nats_errors.ConnectionClosedError as error:
            raise self.failure or Unreachable("the connection is closed") from error
        except nats_errors.BadSubjectError as error:
            raise InvalidName(f"cannot subscribe to {subject!r} (queue {queue!r}): {error}") from error
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
            TooLarge: the server would end the connection over a message of this size.
            InvalidName: the subject is empty or has white space, which could forge another command.
        """
        if not self.is_connected:
            raise self.failure or Unreachable("not connected to the broker")
        if not subject or " " in subject or "\n" in subject or "\r" in subject or "\t" in subject:
            raise InvalidName(f"{subject!r} is not a subject: it is empty or has white space")
        if headers is None:
            size = len(data)
            command = b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), reply, size, data)
        else:
            head = len(headers)
            size = head + len(data)
            command = b"HPUB %b %b %d %d\r\n%b%b\r\n" % (subject.encode(), reply, head, size, headers, data)
        if size > self._max_payload:
            raise TooLarge(f"a message for {subject} has {size} bytes and the broker takes {self._max_payload}")
        if self._out_size > MAX_BUFFER:
            self._out_size = sum(map(len, self._out)) + self._unsent()
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
        future: asyncio.Future[tuple[bytes, bytes | None]] = self._loop.create_future()

        def settle(data: bytes, headers: bytes | None, error: WeftError | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result((data, headers))
            else:
                future.set_exception(error)
                future.exception()  # whoever gave up waiting must not cause a warning

        self.ask_then(subject, data, headers=headers, timeout=timeout, then=settle)
        return future

    def ask_then(self, subject: str, data: bytes, *, headers: bytes | None, timeout: float, then: Answered) -> None:
        """Write a request; `then` is called once from the reader, with the answer or with what became of it."""
        self._counter += 1
        token = b"%d" % self._counter
        self.post(subject, data, reply=self._reply_prefix + token, headers=headers)
        self._waiting[token] = (then, self._loop.time() + timeout)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(SWEEP, self._sweep)

    @property
    def in_flight(self) -> int:
        """Requests without an answer yet."""
        return len(self._waiting)

    def drop_waiting(self, error: WeftError) -> None:
        """Fail every request under way, and forget what was not written."""
        waiting, self._waiting = self._waiting, {}
        pongs, self._pongs = self._pongs, []
        self._out.clear()
        self._out_size = 0
        for pong in pongs:
            if not pong.done():
                pong.set_exception(error)
                pong.exception()  # those of the ping interval have nobody who waits
        for then, _ in waiting.values():
            self._settle(then, error)
        self.requests_lost()

    def _on_reply(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        entry = self._waiting.pop(subject[len(self._reply_prefix) :], None)
        if entry is None:
            return
        if headers is not None and headers[:12] == _NO_RESPONDERS:
            entry[0](b"", None, Unreachable("nobody serves this subject, or this identity may not use it"))
        else:
            entry[0](data, headers, None)
        if self.answered is not None:
            self.answered()

    def _settle(self, then: Answered, error: WeftError) -> None:
        try:
            then(b"", None, error)
        except Exception as failed:  # noqa: BLE001 - reported, and the others are settled too
            self.handler_failed(failed)
        if self.answered is not None:
            self.answered()

    def _write_out(self) -> None:
        self._flush_scheduled = False
        if not (self._out or self._pending):
            return
        out, self._out, self._out_size = self._out, [], 0
        if self.is_connected and self._transport is not None:
            if self._pending:  # a subscription goes before what relies on it
                out[:0] = self._pending
                self._pending = []
                self._pending_data_size = 0
            try:
                self._transport.write(b"".join(out))  # one piece: a vector of many small ones costs more to send
                self._out_size = self._unsent()
            except RuntimeError:
                return  # closed, and the reader has not noticed yet: it fails what was asked

    def _unsent(self) -> int:
        writer: Any = getattr(self._transport, "_io_writer", None)
        return int(writer.transport.get_write_buffer_size()) if writer is not None else 0

    def _sweep(self) -> None:
        now = self._loop.time()
        late = self._sweeper is not None and now - self._sweeper.when() > SWEEP
        self._sweeper = None
        self._spared = late and not self._spared
        if not self._spared:  # else the loop was blocked: answers may have come that the reader could not read yet
            for token in [t for t, (_, deadline) in self._waiting.items() if deadline < now]:
                entry = self._waiting.pop(token, None)
                if entry is not None:
                    self._settle(entry[0], TimedOut("the broker did not answer in time; the outcome is unknown"))
        if self._waiting and not self.is_closed:
            self._sweeper = self._loop.call_later(SWEEP, self._sweep)
