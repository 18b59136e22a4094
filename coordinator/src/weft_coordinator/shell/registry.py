"""The registry's stream: read by every coordinator, written conditionally, one message an agent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Final

from weft.core.broker import Broker
from weft.core.history import StreamReader
from weft_coordinator.decide.registry import AgentRecord
from weft_coordinator.shell.tail import Rounds
from weft_protocols import headers as h
from weft_protocols.errors import Backpressure, Conflict, ParseError
from weft_protocols.resources import REGISTRY

log = logging.getLogger("weft.coordinator")

PREFIX: Final = "mesh.registry."
TRIES: Final = 8
"""Times a change is decided again because another coordinator wrote first."""


class RegistryStore(Rounds):
    """The records of all agents, as of the last `sync`."""

    def __init__(self, broker: Broker, reader: StreamReader) -> None:
        super().__init__()
        self._broker = broker
        self._reader = reader
        self._read = 0
        self._changing = asyncio.Lock()
        self._sequences: dict[str, int] = {}
        self._records: dict[str, AgentRecord] = {}

    @property
    def records(self) -> Mapping[str, AgentRecord]:
        """By agent, without the revoked ones."""
        return {name: record for name, record in self._records.items() if not record.revoked}

    def doubt(self) -> None:
        """The server may be another or have lost its last writes: read everything again."""
        self._read = 0

    def get(self, agent: str) -> AgentRecord | None:
        """The record of an agent, None if it is unknown or revoked."""
        record = self._records.get(agent)
        return None if record is None or record.revoked else record

    async def change(
        self, agent: str, decide: Callable[[AgentRecord | None], AgentRecord | None]
    ) -> AgentRecord | None:
        """Store what `decide` makes of the agent's record, deciding again where somebody else was faster.

        `decide` gets None for an unknown or revoked agent, and returns None to leave things as they are.
        """
        async with self._changing:
            for _ in range(TRIES):
                await self.sync()
                wanted = decide(self.get(agent))
                if wanted is None or wanted == self._records.get(agent):
                    return wanted
                expected = h.block(h.fields({h.EXPECTED_SEQUENCE: str(self._sequences.get(agent, 0))}))
                try:
                    await self._broker.publish(PREFIX + agent, wanted.encode(), headers=expected)
                except Conflict:
                    continue
                await self.sync()
                return wanted
        raise Backpressure(f"the registry record of {agent} is being changed by others; try again")

    async def _round(self) -> None:
        if not self._read:
            self._sequences, self._records = {}, {}
        more = True
        while more:
            batch = await self._reader.batch(REGISTRY, f"{PREFIX}>", start=self._read + 1)
            for one in batch.messages:
                self._read = one.seq
                agent = one.subject.removeprefix(PREFIX)
                self._sequences[agent] = one.seq
                try:
                    self._records[agent] = AgentRecord.decode(one.data)
                except ParseError as error:
                    log.warning("%s: %s", one.subject, error)
            more = batch.more
