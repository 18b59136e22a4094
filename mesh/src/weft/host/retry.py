"""How often something is tried and how long it pauses in between: one policy for tasks and for steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from weft_protocols.errors import DeadlineExceeded, DeadlockError, InvalidConfig, WeftError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How an agent's tasks, or a step's body, are tried.

    The pause after the n-th failure is `initial * factor ** (n - 1)` seconds, at most `max_interval`, less a random
    share of up to `jitter`. An error with an attribute `retry_after` (seconds) sets the pause itself.

    Raises:
        InvalidConfig: a number is out of range.
    """

    attempts: int = 3
    """Tries in all, the first one included."""
    initial: float = 0.5
    """Seconds after the first failure."""
    factor: float = 3.0
    """By which each further pause is longer."""
    max_interval: float = 30.0
    """Seconds, the longest pause."""
    jitter: float = 0.5
    """Share of a pause, 0 to 1, that is random, so that what failed together does not come back together."""
    final: tuple[type[BaseException], ...] = ()
    """Errors that another try cannot help."""
    timeout: float | None = None
    """Seconds one try of a step may take; not for agents, whose tasks have a deadline."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise InvalidConfig(f"attempts of a retry policy is {self.attempts}; it must be at least 1")
        if not 0 <= self.jitter <= 1:
            raise InvalidConfig(f"jitter of a retry policy is {self.jitter}; it must be from 0 to 1")
        if self.initial < 0 or self.max_interval < 0 or self.factor < 1:
            raise InvalidConfig("a retry policy needs initial and max_interval from 0, and a factor from 1")

    def pause(self, failures: int, error: BaseException | None = None, *, random: float) -> float:
        """Seconds before the next try after `failures` failures; `random` is a number from 0 to 1."""
        told = asked_pause(error)
        if told is not None:
            return told
        try:
            whole = min(self.max_interval, self.initial * self.factor ** (failures - 1))
        except OverflowError:
            whole = self.max_interval
        return whole * (1.0 - self.jitter * random)

    def ends(self, error: BaseException) -> bool:
        """Whether another try cannot help against `error`."""
        if isinstance(error, DeadlockError) and error.lasting:
            return True
        if isinstance(error, WeftError) and not error.retryable and not isinstance(error, DeadlineExceeded):
            return True
        return isinstance(error, self.final)


class StepOptions(RetryPolicy):
    """A step's `RetryPolicy` in other words: `retries` counts further tries, `backoff` doubles up to `max_backoff`."""

    __slots__ = ()

    def __init__(
        self,
        retries: int = 0,
        timeout: float | None = None,
        backoff: float = 0.5,
        max_backoff: float = 30.0,
        final: tuple[type[BaseException], ...] = (),
    ) -> None:
        RetryPolicy.__init__(
            self,
            attempts=retries + 1,
            initial=backoff,
            factor=2.0,
            max_interval=max_backoff,
            final=final,
            timeout=timeout,
        )


ONCE: Final = RetryPolicy(attempts=1)
"""No second try."""
DEADLOCK: Final = RetryPolicy(attempts=20, initial=0.1, factor=2.0, max_interval=10.0, jitter=0.8)
"""How often a task gives way in deadlocks before that counts as a failed attempt, and how long it waits each time."""


def asked_pause(error: BaseException | None) -> float | None:
    """The pause an error asks for by its `retry_after`, in seconds; None where it asks for none."""
    told = getattr(error, "retry_after", None)
    if isinstance(told, bool) or not isinstance(told, int | float) or not math.isfinite(told) or told <= 0:
        return None
    return float(told)
