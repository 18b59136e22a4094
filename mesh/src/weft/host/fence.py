"""The claim a replica writes under, and how it finds out what became of writes whose outcome is unknown."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from weft.core.broker import Broker
from weft.host import takeover
from weft_protocols.errors import Conflict, Fenced
from weft_protocols.records import Claim


class Fence:
    """One task's claim. Every write names its sequence, `token`; the broker refuses the write after a newer claim.

    Claiming anew (`renew`) draws a line: what was in flight under the old token is either stored before the new
    claim or refused. So after it the log can be read and what is missing sent again, without repeating anything.
    """

    def __init__(self, broker: Broker, agent: str, *, task_id: str, claim: Claim, token: int) -> None:
        self.claim = claim
        self.token = token
        self.lines = takeover.fence(agent, task_id, token)
        """Header lines of a write under the claim."""
        self.renewing = asyncio.Lock()
        self._broker = broker
        self._agent = agent
        self._task_id = task_id

    async def renew(self) -> None:
        """Claim anew under this fence's own claim; Fenced if somebody else has claimed."""
        claim = replace(self.claim, at=max(self.claim.at + 1, time.time_ns() // 1_000_000))
        await self.write(claim)

    async def write(self, claim: Claim) -> None:
        """Write a claim expecting this fence's to be the last; Fenced if it is not."""
        try:
            self.token = await takeover.write_claim(
                self._broker, self._agent, task_id=self._task_id, claim=claim, expected=self.token
            )
        except Conflict as error:
            raise Fenced(f"a newer claim owns task {self._task_id}") from error
        self.claim = claim
        self.lines = takeover.fence(self._agent, self._task_id, self.token)

    async def lost(self, used: bytes) -> None:
        """Return if a write that was refused under `used` can be tried under a renewed claim; Fenced otherwise."""
        async with self.renewing:
            if self.lines == used:
                raise Fenced(f"a newer claim owns task {self._task_id}")
