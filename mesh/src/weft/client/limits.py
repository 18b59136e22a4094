"""Rate limits that hold for all sidecars together: see `weft.policy.rate` for how few hops that takes."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from weft.core.latest import Latest
from weft.policy.model import Limit, Request
from weft.policy.rate import Leases, chunk, taken
from weft_protocols.errors import BrokerError, Conflict, InvalidConfig
from weft_protocols.resources import RATE_PREFIX, RATES

if TYPE_CHECKING:
    from weft.core.broker import Broker

log = logging.getLogger("weft.policy")

TRIES: Final = 20
"""Attempts at one change while others change the same."""
UNKNOWN: Final = 1.0
"""Seconds to wait where it is not known how far a limit is used."""


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

    async def take(self, limits: Iterable[Limit], request: Request) -> float:
        """Count a call; 0 if all limits allow it, else the seconds to wait for the one that does not.

        Where the broker cannot be asked and nothing is left of what was taken, the call has to wait. Tokens that other
        limits gave to a call that then had to wait are spent.
        """
        for limit in limits:
            if wait := await self._take(limit, limit.key(request)):
                return wait
        return 0.0

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
        name = hashlib.sha256(f"{key}:{limit.calls}/{limit.seconds:g}:{limit.burst}".encode()).hexdigest()
        try:
            for _ in range(TRIES):
                found = await self._rates.get(name)
                now = time.time()
                tat = float(found.data) if found is not None else 0.0
                count, after, wait = taken(limit, tat, now, chunk(limit, self._sidecars()))
                if not count:
                    self._leases.refused(key, wait, now)
                    return wait
                try:
                    await self._rates.put(name, repr(after).encode(), after=found.seq if found is not None else 0)
                except Conflict:
                    continue
                self._leases.add(key, count, now)
                self._leases.spend(key, now)
                return 0.0
        except (BrokerError, ValueError, InvalidConfig) as error:
            log.warning("how far a rate limit is used cannot be read or written: %s", error)
        return UNKNOWN


__all__ = ["SharedLimits"]
