"""Rate limits that hold for all sidecars together: see `weft.policy.rate` for how few hops that takes."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import random
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from weft.core.latest import Latest, Record
from weft.policy.model import Limit, Request
from weft.policy.rate import Leases, chunk, returned, taken
from weft_protocols.errors import BrokerError, Conflict, InvalidConfig
from weft_protocols.resources import RATE_PREFIX, RATES

if TYPE_CHECKING:
    from weft.core.broker import Broker

log = logging.getLogger("weft.policy")

WITHIN: Final = 5.0
"""Seconds that one change may take, while others change the same."""
PAUSES: Final = (0.001, 0.002, 0.005, 0.01, 0.02)
"""Seconds at most before another attempt: two that go in step would else get in each other's way for ever."""
UNKNOWN: Final = 1.0
"""Seconds to wait where it is not known how far a limit is used."""


@dataclass(frozen=True, slots=True)
class Over:
    """A call has to wait."""

    limit: Limit
    """The limit that does not allow it now."""
    seconds: float
    """How long."""


class SharedLimits:
    """The limits of one sidecar, shared with the others.

    Args:
        broker: a connection of account MESH.
        sidecars: how many there are about now.
    """

    def __init__(self, broker: Broker, *, sidecars: Callable[[], int] = lambda: 1) -> None:
        self._rates = Latest(broker, RATES, RATE_PREFIX)
        self._sidecars = sidecars
        self._leases = Leases()
        self._asking: dict[str, asyncio.Lock] = {}

    async def take(self, limits: Iterable[Limit], request: Request) -> Over | None:
        """Count a call; None if all limits allow it, else one that does not. Then nothing is counted.

        Where the broker cannot be asked and nothing is left of what was taken, the call has to wait.
        """
        counted: list[Limit] = []
        for limit in limits:
            if wait := await self._take(limit, limit.key(request)):
                await self.give_back(counted, request)
                return Over(limit, wait)
            counted.append(limit)
        return None

    async def give_back(self, limits: Iterable[Limit], request: Request) -> None:
        """Do not count a call that was counted just now and was not made. What cannot be given back is lost."""
        for limit in limits:
            key = limit.key(request)
            if chunk(limit, self._sidecars()) > 1:
                self._leases.give_back(key, time.time())
            else:
                await self._give_back(limit, key)

    async def _take(self, limit: Limit, key: str) -> float:
        if self._leases.spend(key, time.time()):
            return 0.0
        # One at a time asks for a chunk; the others spend of it.
        asking = self._asking.setdefault(key, asyncio.Lock())
        try:
            async with asking:
                now = time.time()
                if self._leases.spend(key, now):
                    return 0.0
                if wait := self._leases.wait(key, now):
                    return wait
                return await self._fetch(limit, key)
        finally:
            if not asking.locked():
                self._asking.pop(key, None)

    async def _fetch(self, limit: Limit, key: str) -> float:
        """Take a chunk and spend one of it; 0, or the seconds to wait."""

        def change(tat: float, now: float) -> tuple[int, float, float]:
            return taken(limit, tat, now, chunk(limit, self._sidecars()))

        count, wait, now = await self._change(limit, key, change)
        if not count:
            # Whoever asks next gets the same answer until then, without a hop.
            self._leases.refused(key, wait, now)
            return wait
        self._leases.add(key, count, now)
        self._leases.spend(key, now)
        return 0.0

    async def _give_back(self, limit: Limit, key: str) -> None:
        count, _, _ = await self._change(limit, key, lambda tat, now: (1, returned(limit, tat, now), 0.0))
        if count:
            self._leases.allowed(key)

    async def _change(
        self, limit: Limit, key: str, change: Callable[[float, float], tuple[int, float, float]]
    ) -> tuple[int, float, float]:
        """Change the shared state from what it is; the tokens, seconds to wait if it was none, and when that was."""
        name = hashlib.sha256(f"{key}:{limit.calls}/{limit.seconds:g}:{limit.burst}".encode()).hexdigest()
        try:
            async with asyncio.timeout(WITHIN):
                found = await self._rates.get(name)
                for attempt in itertools.count():
                    now = time.time()
                    count, after, wait = change(_tat(found), now)
                    if not count:
                        return 0, wait, now
                    data = f"{after!r} {uuid.uuid4().hex}".encode()
                    try:
                        await self._rates.put(name, data, after=found.seq if found is not None else 0)
                    except Conflict:
                        found = await self._rates.get(name)
                        if found is None or found.data != data:  # else an attempt of ours was stored after all
                            await asyncio.sleep(random.uniform(0.0, PAUSES[min(attempt, len(PAUSES) - 1)]))
                            found = await self._rates.get(name)
                            continue
                    return count, 0.0, now
        except (BrokerError, ValueError, InvalidConfig, TimeoutError) as error:
            log.warning("how far a rate limit is used cannot be read or written: %s", error or "it takes too long")
        return 0, UNKNOWN, time.time()


def _tat(found: Record | None) -> float:
    """The state in a record: the number before whatever tells one write from another."""
    return float(found.data.split()[0]) if found is not None else 0.0


__all__ = ["Over", "SharedLimits"]
