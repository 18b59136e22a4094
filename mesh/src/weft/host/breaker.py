"""Circuit breakers: an agent whose tasks fail is not called for a while. Pure; time and chance come in as numbers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, Literal

from weft_protocols.errors import InvalidConfig

BUCKETS: Final = 10
"""Parts of a window; what is older leaves it one part at a time."""


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When the calls of an agent are stopped, and for how long.

    A task that left a dead letter or missed its deadline is a failure. One that was rejected, failed on purpose
    (`weft.Fail`), or was cancelled is none.

    Raises:
        InvalidConfig: a number is out of range.
    """

    window: float = 30.0
    """Seconds for which the end of a call counts."""
    calls: int = 10
    """Ended calls in the window below which nothing is concluded."""
    ratio: float = 0.5
    """Share of failures among them at which the circuit opens."""
    open_for: float = 10.0
    """Seconds until one call is let through to try; doubled each time that fails."""
    longest: float = 120.0
    """Seconds, the longest such pause."""
    jitter: float = 0.3
    """Share of a pause, 0 to 1, that is random, so that not everybody tries at once."""

    def __post_init__(self) -> None:
        if self.window <= 0 or self.open_for <= 0 or self.calls < 1 or self.longest < self.open_for:
            raise InvalidConfig("a breaker needs window and open_for over 0, calls from 1 and longest from open_for")
        if not (0 < self.ratio <= 1 and 0 <= self.jitter <= 1):
            raise InvalidConfig("a breaker needs a ratio over 0 up to 1, and a jitter from 0 to 1")


BREAKER: Final = BreakerPolicy()
"""What an agent has unless it says otherwise."""


class Breaker:
    """The circuit to one agent. All times are seconds of one clock, which never goes back."""

    def __init__(self, policy: BreakerPolicy) -> None:
        self.state: Literal["closed", "open", "half-open"] = "closed"
        self._policy = policy
        self._buckets: deque[tuple[int, list[int]]] = deque()
        """(number, [ended, failed]) of each part of the window."""
        self._until = 0.0
        """When an open circuit lets a call through, or a half-open one the next."""
        self._opened = 0
        """How often it opened since it was last closed."""

    def wait(self, now: float) -> float:
        """Seconds until a call may be tried; 0 if it may now."""
        return 0.0 if self.state == "closed" else max(0.0, self._until - now)

    def begin(self, now: float) -> bool:
        """A call is made, which `wait` allowed; whether it is the one that finds out."""
        if self.state == "closed":
            return False
        self.state = "half-open"
        # A probe that is never heard of again must not keep the circuit open for ever.
        self._until = now + self._pause()
        return True

    def end(self, now: float, *, failed: bool, probe: bool, random: float) -> None:
        """A call ended; `random` is from 0 to 1."""
        if self.state == "closed":
            ended, failures = self._count(now, failed)
            if failed and ended >= self._policy.calls and failures >= ended * self._policy.ratio:
                self._open(now, random)
        elif self.state == "half-open" and probe:
            if failed:
                self._open(now, random)
            else:
                self.state, self._opened = "closed", 0
                self._buckets.clear()

    def give_up(self, now: float, *, probe: bool) -> None:
        """A call ended without a verdict: where it was to find out, the next one may."""
        if self.state == "half-open" and probe:
            self._until = now

    @property
    def told(self) -> tuple[int, int]:
        """Ended calls and failures in the window when last counted."""
        return sum(one[0] for _, one in self._buckets), sum(one[1] for _, one in self._buckets)

    def _open(self, now: float, random: float) -> None:
        self.state = "open"
        self._until = now + self._pause() * (1.0 + self._policy.jitter * (random - 0.5))
        self._opened += 1

    def _pause(self) -> float:
        return min(self._policy.longest, self._policy.open_for * 2.0 ** min(self._opened, 32))

    def _count(self, now: float, failed: bool) -> tuple[int, int]:
        number = int(now / self._policy.window * BUCKETS)
        while self._buckets and self._buckets[0][0] <= number - BUCKETS:
            self._buckets.popleft()
        if not self._buckets or self._buckets[-1][0] != number:
            self._buckets.append((number, [0, 0]))
        bucket = self._buckets[-1][1]
        bucket[0] += 1
        bucket[1] += failed
        return self.told
