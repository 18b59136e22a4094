"""Rate limits of several sidecars without a central hop per call: one number each, and tokens leased in chunks. Pure.

A limit's whole state is the theoretical arrival time of GCRA, stored where all sidecars can change it conditionally. A
sidecar does not ask for each call: it takes a chunk of tokens out of that state and spends them by itself. What is
taken is spent, whether it is used or not, so that nothing is allowed twice; at most the chunks that are out come later
than they were counted. A chunk is what the limit allows in `CHUNK` seconds, shared by the sidecars, so rare calls are
counted one by one, and frequent ones about once a second.

All sidecars count by the clock they say: a clock that is ahead by d seconds sees `rate * d` more tokens once, and the
rate over time holds nevertheless.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from weft.policy.model import Limit

CHUNK: Final = 1.0
"""Seconds of the limit's rate that one chunk holds, before it is divided among the sidecars."""
KEPT: Final = 5.0
"""Seconds a chunk can be spent; what is left of it then is lost."""
LIMITS: Final = 10_000
"""Limits whose chunks are kept; those used last stay."""


@dataclass(slots=True)
class Gcra:
    """The generic cell rate algorithm: `burst` at once, `rate` a second over time."""

    rate: float
    burst: int
    tat: float = 0.0
    """Theoretical arrival time, unix seconds: the whole state."""

    def take(self, now: float, most: int = 1) -> int:
        """Take up to `most` tokens; how many."""
        # A hair more than none, against the rounding of unix seconds.
        room = self.burst - max(0.0, self.tat - now) * self.rate + 1e-6
        taken = max(0, min(most, math.floor(room)))
        if taken:
            self.tat = max(self.tat, now) + taken / self.rate
        return taken

    def wait(self, now: float) -> float:
        """Seconds until there is a token; 0 if there is one."""
        return max(0.0, (self.tat - now) - (self.burst - 1) / self.rate)


def chunk(limit: Limit, sidecars: int = 1) -> int:
    """Tokens that one of so many sidecars takes at once: never all of the burst, so that the others find some."""
    return max(1, min(math.floor(limit.rate * CHUNK / max(1, sidecars)), limit.burst // 2))


def taken(limit: Limit, tat: float, now: float, most: int) -> tuple[int, float, float]:
    """One change of the shared state: how many tokens, the new state, and seconds to wait if it was none."""
    bucket = Gcra(limit.rate, limit.burst, tat)
    count = bucket.take(now, most)
    return count, bucket.tat, 0.0 if count else bucket.wait(now)


def returned(limit: Limit, tat: float, now: float) -> float:
    """The shared state when one token of a call that was not made is given back, soon after it was taken."""
    return max(0.0, tat - 1 / limit.rate) if tat > now else tat


@dataclass(slots=True)
class _Chunk:
    left: int = 0
    until: float = 0.0
    not_before: float = 0.0
    """When it makes sense to ask again."""


@dataclass(slots=True)
class Leases:
    """The tokens that one sidecar has."""

    _chunks: OrderedDict[str, _Chunk] = field(default_factory=OrderedDict)

    def spend(self, key: str, now: float) -> bool:
        """Spend a token for a call. False if there is none: take a chunk, unless `wait` says that it is too early."""
        found = self._chunks.get(key)
        if found is None or not found.left or found.until <= now:
            return False
        found.left -= 1
        return True

    def wait(self, key: str, now: float) -> float:
        """Seconds for which asking for more is of no use."""
        found = self._chunks.get(key)
        return max(0.0, found.not_before - now) if found is not None else 0.0

    def add(self, key: str, tokens: int, now: float) -> None:
        """Keep tokens that were taken."""
        found = self._chunks.setdefault(key, _Chunk())
        found.left = tokens + (found.left if found.until > now else 0)
        found.until = now + KEPT
        found.not_before = 0.0
        self._chunks.move_to_end(key)
        while len(self._chunks) > LIMITS:
            self._chunks.popitem(last=False)

    def give_back(self, key: str, now: float) -> None:
        """Keep a token that was spent on nothing, as long as the rest of its chunk; it is lost after that."""
        found = self._chunks.get(key)
        if found is not None and found.until > now:
            found.left += 1

    def allowed(self, key: str) -> None:
        """There may be tokens again: ask when one is needed."""
        found = self._chunks.get(key)
        if found is not None:
            found.not_before = 0.0

    def refused(self, key: str, wait: float, now: float) -> None:
        """Remember that there were none, and for how long."""
        self._chunks.setdefault(key, _Chunk()).not_before = now + wait
