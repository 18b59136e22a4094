"""How many sidecars there are about now: each says every few seconds that it is there, and hears the others."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import Final

from weft.core.broker import Broker, Delivered, Subscription
from weft.core.supervise import Tasks
from weft_protocols.errors import BrokerError
from weft_protocols.resources import SIDECARS

log = logging.getLogger("weft.sidecar")

BEAT: Final = 5.0
"""Seconds between signs of life."""
GONE: Final = 2.5 * BEAT
"""Seconds of silence after which a sidecar counts no more."""
_HERE: Final = b"here"
_LEFT: Final = b"left"


class Siblings:
    """The sidecars of a mesh, as one of them hears of them. Lost signs make the number too small, never wrong limits.

    Args:
        broker: a connection of account MESH.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._own = uuid.uuid4().hex
        self._heard: dict[str, float] = {}
        self._subscription: Subscription | None = None
        self._tasks = Tasks("signs of life of the sidecar")

    @property
    def count(self) -> int:
        """How many, this one included."""
        now = time.monotonic()
        return 1 + sum(now - at < GONE for at in self._heard.values())

    async def start(self) -> None:
        """Hear of the others, and say that this one is there."""
        self._subscription = await self._broker.subscribe(f"{SIDECARS}.*", self._on_sign)
        self._tasks.start(self._beat())

    async def aclose(self) -> None:
        """Say that it leaves."""
        await self._tasks.aclose()
        if self._subscription is not None:
            await self._subscription.close()
            self._say(_LEFT)

    async def _beat(self) -> None:
        while True:
            self._say(_HERE)
            await asyncio.sleep(BEAT)
            now = time.monotonic()
            self._heard = {name: at for name, at in self._heard.items() if now - at < GONE}

    def _on_sign(self, message: Delivered) -> None:
        name = message.subject.rpartition(".")[2]
        if name == self._own:
            return
        if message.data == _LEFT:
            self._heard.pop(name, None)
            return
        new = name not in self._heard
        self._heard[name] = time.monotonic()
        if new:
            self._say(_HERE)  # so that it need not wait for our next sign

    def _say(self, what: bytes) -> None:
        try:
            self._broker.send(f"{SIDECARS}.{self._own}", what)
        except BrokerError as error:
            log.debug("a sign of life is lost: %s", error)


__all__ = ["Siblings"]
