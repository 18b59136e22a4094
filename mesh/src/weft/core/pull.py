"""A pull loop on a durable consumer that outlives timeouts, reconnects and server restarts.

The server forgets the pulls of a connection that broke, and nats-py's own `fetch` can wait for one that no
longer exists. This loop counts what it asked for, is told by status messages what the server gave back, and
asks again when neither message nor heartbeat came for a while.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Final, NamedTuple, Self

from weft.core.broker import Broker, Subscription
from weft.core.supervise import Tasks
from weft_protocols import headers as h
from weft_protocols.accounts import ACK, NEXT
from weft_protocols.errors import BrokerError
from weft_protocols.resources import SECOND

log = logging.getLogger("weft.pull")

EXPIRES: Final = 30.0
"""Seconds the server keeps a pull open."""
HEARTBEAT: Final = 5.0
"""Seconds between the server's signs that it still knows the pull."""
QUIET: Final = 0.02
"""Seconds without a message after which a loop that stops takes the server to be sending none."""
LINGER: Final = 1.0
"""Seconds it waits for that at most."""
_ACK_PREFIX: Final = ACK.encode() + b"."


class Delivery(NamedTuple):
    """One delivered message and how to settle it."""

    subject: str
    data: bytes
    headers: bytes | None
    ack: str
    """Acknowledgement subject."""

    @property
    def sequence(self) -> int:
        """Stream sequence of the message."""
        return int(self.ack.split(".")[5])

    @property
    def times(self) -> int:
        """How often it was delivered, this time included."""
        return int(self.ack.split(".")[4])


class PullLoop:
    """Asks a consumer for as many messages as its owner has room for.

    Args:
        handler: gets each message, from the reader; must not block.
        steady: True: there is always as much room as `want` said, and it is filled up as messages come. False: each
            message takes one of the room, until `want` says that there is more. None: the room stays, and is filled
            up when nothing is asked for any more.
        expires: seconds the server keeps a pull open.
        heartbeat: seconds between its signs of life; silence of two and a half of them counts as lost.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        stream: str,
        consumer: str,
        handler: Callable[[Delivery], None],
        steady: bool | None = None,
        expires: float = EXPIRES,
        heartbeat: float = HEARTBEAT,
    ) -> None:
        self._broker = broker
        self._next = f"{NEXT}.{stream}.{consumer}"
        self._handler = handler
        self._steady = steady
        self._heartbeat = heartbeat
        self._terms = {"expires": int(expires * SECOND), "idle_heartbeat": int(heartbeat * SECOND)}
        self._inbox = ""
        self._subscription: Subscription | None = None
        self._opener = Tasks(f"pull on {consumer}")
        self._open_now = False
        self._doubtful = False
        """Whether pulls may be open that are not counted, or counted that are not open: nothing more is asked."""
        self._wanted = 0
        self._asked = 0
        self._heard = 0.0
        self._troubled = False
        self._timer: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._undo: Callable[[], None] = lambda: None
        self._stopped = False
        self._came = asyncio.Event()

    async def start(self) -> Self:
        """Begin to listen. Nothing is asked for before `want`."""
        await self._open()
        self._undo = self._broker.on_reconnect(self._doubt)
        self._watch()
        return self

    def want(self, room: int) -> None:
        """Tell how many messages the owner has room for now; asks the server for what is missing."""
        self._wanted = room
        missing = room - self._asked
        if missing > 0 and (self._asked == 0 or missing * 4 >= room):
            self._ask(missing)

    async def stop(self) -> None:
        """Ask for nothing more. What the server is sending to an open pull still goes to the handler."""
        self._stopped = True
        self._undo()
        for timer in (self._timer, self._retry):
            if timer is not None:
                timer.cancel()
        await self._opener.aclose()
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await self._quiet()
            await subscription.drain()

    async def _quiet(self) -> None:
        """Let a burst pass: what the server sends to a pull that nobody listens to any more has to be redelivered."""
        try:
            async with asyncio.timeout(LINGER):
                while self._asked and self._broker.connected:
                    self._came.clear()
                    async with asyncio.timeout(QUIET):
                        await self._came.wait()
        except TimeoutError:
            log.debug("pull on %s ends with %d messages asked for", self._next, self._asked)

    def _ask(self, batch: int) -> None:
        if not self._open_now or self._doubtful or self._stopped or not self._broker.connected:
            return
        body = json.dumps({"batch": batch, **self._terms}).encode()
        try:
            self._broker.send(self._next, body, reply=f"{self._inbox}.{batch}")
        except BrokerError as error:
            log.debug("could not pull: %s", error)
            return
        if self._asked == 0:
            self._heard = asyncio.get_running_loop().time()
        self._asked += batch

    def _on_message(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        self._heard = asyncio.get_running_loop().time()
        if reply.startswith(_ACK_PREFIX):
            self._asked = max(0, self._asked - 1)
            self._troubled = False
            if self._stopped:
                self._came.set()
            if self._steady:
                self.want(self._wanted)
            elif self._steady is not None:
                self._wanted = max(0, self._wanted - 1)
            self._handler(Delivery(subject.decode(), bytes(data), headers, reply.decode()))
            return
        # Only a status message arrives on the inbox itself, whose last token is the batch of its pull.
        code, text = h.status(headers)
        if code != 100:
            unused = h.get(headers, b"Nats-Pending-Messages") or subject.rpartition(b".")[2]
            self._asked = max(0, self._asked - int(unused))
        if code in (100, 404, 408):
            pause = 0.02
            if self._troubled:
                self._troubled = False
                log.info("pull on %s works again", self._next)
        else:
            pause = 0.5
            self._trouble(f"{code} {text}".strip())
        if code != 100 and self._retry is None and not self._stopped:
            self._retry = asyncio.get_running_loop().call_later(pause, self._again)

    def _trouble(self, what: str) -> None:
        """Tell it once, until the pull works again."""
        log.log(logging.DEBUG if self._troubled else logging.WARNING, "pull on %s: %s", self._next, what)
        self._troubled = True

    def _again(self) -> None:
        self._retry = None
        self.want(self._wanted)

    def _doubt(self) -> None:
        """The server may have forgotten the open pulls, or may still serve them: begin with new ones."""
        self._doubtful = True
        if len(self._opener) == 0 and not self._stopped:
            self._opener.start(self._reopen())

    async def _reopen(self) -> None:
        try:
            while self._doubtful and self._broker.connected:
                await self._open()
        except BrokerError as error:
            log.debug("pull on %s stays closed for now: %s", self._next, error)
            return
        self.want(self._wanted)

    async def _open(self) -> None:
        """Listen on an inbox of its own, so that pulls made before can bring nothing more: nobody listens to them."""
        self._open_now = self._doubtful = False
        if self._subscription is not None:
            await self._subscription.drain()
        self._inbox = self._broker.new_inbox()
        self._subscription = await self._broker.subscribe_raw(f"{self._inbox}.*", self._on_message)
        self._asked = 0
        self._open_now = True

    def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        silent = loop.time() - self._heard
        if len(self._opener):
            log.debug("pull on %s is being opened", self._next)
        elif self._doubtful or not self._open_now:
            self._doubt()
        elif self._asked and silent > 2.5 * self._heartbeat and self._broker.connected:
            self._trouble(f"silent for {silent:.0f} s; asking again")
            self._doubt()
        elif not self._asked:
            self.want(self._wanted)
        if not self._stopped and not self._broker.closed.is_set():
            self._timer = loop.call_later(self._heartbeat / 2, self._watch)
