"""Answers the NATS services protocol, so that `nats micro ls` shows the agents: in account MESH, for every replica."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Final

from weft.core.broker import Broker, Delivered
from weft_coordinator.decide import micro
from weft_coordinator.decide.presence import Presence
from weft_coordinator.shell.registry import RegistryStore
from weft_protocols.errors import BrokerError, WeftError

log = logging.getLogger("weft.coordinator")

QUEUE: Final = "micro"
"""Queue group: one coordinator answers for all replicas."""
SUBJECTS: Final = tuple(f"{micro.PREFIX}.{verb}{rest}" for verb in micro.VERBS for rest in ("", ".*", ".*.*"))


class MicroService:
    """Answers out of the registry and of what this coordinator heard; `clock` is unix milliseconds."""

    def __init__(self, broker: Broker, store: RegistryStore, presence: Presence, *, clock: Callable[[], int]) -> None:
        self._broker = broker
        self._store = store
        self._presence = presence
        self._clock = clock

    async def answer(self, message: Delivered) -> None:
        """Send one answer for each replica asked for."""
        if not message.reply:
            return
        try:
            await self._store.sync()
        except WeftError as error:
            log.debug("%s is answered from memory: %s", message.subject, error)
        try:
            for one in micro.answers(message.subject, self._store.records, self._presence, now=self._clock()):
                self._broker.send(message.reply, json.dumps(one).encode())
        except BrokerError as error:
            log.debug("%s stays unanswered: %s", message.subject, error)
