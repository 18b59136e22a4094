"""What the broker says is due: the leader hands it to whom it is for."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeAlias

from weft.core.broker import Broker
from weft.core.pull import Delivery, PullLoop
from weft.core.supervise import Tasks
from weft_coordinator.service.part import Part
from weft_protocols.errors import BrokerError, WeftError
from weft_protocols.resources import COORD, DUE_CONSUMER

log = logging.getLogger("weft.coordinator")

SCHEDULE: Final = "Nats-Schedule"
"""Header of a schedule: when it is due, in the broker's notation."""
TARGET: Final = "Nats-Schedule-Target"
"""Header of a schedule: where the broker stores that it is due."""
KEPT: Final = "Nats-Schedule-TTL"
"""Header of a schedule: how long that stays, `24h`."""
ZONE: Final = "Nats-Schedule-Time-Zone"
ROOM: Final = 256
"""Messages worked on at a time."""
AGAIN: Final = 2.0
"""Seconds until a message that could not be worked on comes again."""
Due: TypeAlias = Callable[[str, Delivery], Awaitable[None]]
"""Works on what is due: the rest of its name, and the message. It is acknowledged when this returns."""


class DuePart(Part):
    """Reads the consumer of what is due while its coordinator leads.

    Args:
        handlers: By the beginning of a name, such as `t-`.
    """

    def __init__(self, broker: Broker, handlers: Mapping[str, Due]) -> None:
        self._broker = broker
        self._handlers = handlers
        self._tasks = Tasks("what is due")
        self._loop: PullLoop | None = None

    async def tick(self, now: int) -> None:
        """Begin to read; here and not in `lead`, since nothing can be decided before that has returned."""
        if self._loop is None:
            loop = PullLoop(
                self._broker, stream=COORD, consumer=DUE_CONSUMER, handler=self._on_due, steady=True
            )  # fmt: skip
            self._loop = await loop.start()
            loop.want(ROOM)

    def deposed(self) -> None:
        """Read no more; what was read and not acknowledged comes to the next leader."""
        loop, self._loop = self._loop, None
        if loop is not None:
            self._tasks.start(loop.stop())

    async def aclose(self) -> None:
        """End what is being worked on."""
        self.deposed()
        await self._tasks.aclose()

    def _on_due(self, delivery: Delivery) -> None:
        self._tasks.start(self._work(delivery), name=delivery.subject)

    async def _work(self, delivery: Delivery) -> None:
        name = delivery.subject.rpartition(".")[2]
        handler = next((one for start, one in self._handlers.items() if name.startswith(start)), None)
        answer = b"+ACK"
        if self._loop is None:
            answer = b"-NAK"  # for whoever leads now
        elif handler is None:
            answer = b"+TERM nobody knows what this is for"
        else:
            try:
                await handler(name.partition("-")[2], delivery)
            except WeftError as error:
                log.warning("%s: %s; again in %g s", name, error, AGAIN)
                answer = b'-NAK {"delay": %d}' % int(AGAIN * 1e9)
        try:
            self._broker.send(delivery.ack, answer)
        except BrokerError as error:
            log.debug("%s comes again: %s", name, error)
