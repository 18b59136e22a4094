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
from weft_protocols import headers as h
from weft_protocols.accounts import ACK, NEXT
from weft_protocols.errors import BrokerError
from weft_protocols.resources import SECOND

log = logging.getLogger("weft.pull")

EXPIRES: Final = 30.0
"""Seconds the server keeps a pull open."""
HEARTBEAT: Final = 5.0
"""Seconds between the server's signs that it still knows the pull."""
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
    """Asks a consumer for as many messages as its owner has room for."""

    def __init__(self, broker: Broker, *, stream: str, consumer: str, handler: Callable[[Delivery], None]) -> None:
        self._broker = broker
        self._next = f"{NEXT}.{stream}.{consumer}"
        self._handler = handler
        self._inbox = broker.new_inbox()
        self._subscription: Subscription | None = None
        self._wanted = 0
        self._asked = 0
        self._heard = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._generation = 0
        self._stopped = False

    async def start(self) -> Self:
        """Begin to listen. Nothing is asked for before `want`."""
        self._subscription = await self._broker.subscribe_raw(f"{self._inbox}.*", self._on_message)
        self._broker.on_reconnect(self._restart)
        self._heard = asyncio.get_running_loop().time()
        self._watch()
        return self

    def want(self, room: int) -> None:
        """Tell how many messages the owner has room for now; asks the server for what is missing."""
        self._wanted = room
        missing = room - self._asked
        if missing > 0 and (self._asked == 0 or missing * 4 >= room):
            self._ask(missing)

    async def stop(self) -> None:
        """Ask for nothing more. What the server still delivers to an open pull goes to the handler until then."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        if self._subscription is not None:
            await self._subscription.close()

    def _ask(self, batch: int) -> None:
        if self._stopped or not self._broker.connected:
            return
        body = {"batch": batch, "expires": int(EXPIRES * SECOND), "idle_heartbeat": int(HEARTBEAT * SECOND)}
        try:
            self._broker.send(self._next, json.dumps(body).encode(), reply=f"{self._inbox}.{self._generation}")
        except BrokerError as error:
            log.debug("could not pull: %s", error)
            return
        if self._asked == 0:
            self._heard = asyncio.get_running_loop().time()
        self._asked += batch

    def _on_message(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        if reply.startswith(_ACK_PREFIX):
            self._heard = asyncio.get_running_loop().time()
            self._asked = max(0, self._asked - 1)
            self._handler(Delivery(subject.decode(), bytes(data), headers, reply.decode()))
            return
        # Only a status message arrives on the inbox itself, whose last token is the generation of its pull.
        if not subject.endswith(b".%d" % self._generation):
            return
        self._heard = asyncio.get_running_loop().time()
        code, text = h.status(headers)
        if code == 100:
            return
        unused = h.get(headers, b"Nats-Pending-Messages")
        self._asked = max(0, self._asked - int(unused)) if unused is not None else 0
        if code not in (404, 408):
            log.warning("pull on %s ended: %s %s", self._next, code, text)
        asyncio.get_running_loop().call_later(0.02 if code == 408 else 0.5, self._again)

    def _again(self) -> None:
        self.want(self._wanted)

    def _restart(self) -> None:
        self._generation += 1
        self._asked = 0
        self.want(self._wanted)

    def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        silent = loop.time() - self._heard
        if self._asked and silent > 2.5 * HEARTBEAT and self._broker.connected:
            log.warning("pull on %s is silent for %.0f s; asking again", self._next, silent)
            self._restart()
        elif not self._asked:
            self.want(self._wanted)
        if not self._stopped and not self._broker.closed.is_set():
            self._timer = loop.call_later(HEARTBEAT / 2, self._watch)
