"""The circuits of one replica, by the agent that is called."""

from __future__ import annotations

import random
import time

from weft.host.breaker import Breaker, BreakerPolicy
from weft_protocols.errors import CircuitOpen


class Circuits:
    """Whom tasks of this replica may call; nothing of it is shared with others, and nothing outlives it."""

    def __init__(self, policy: BreakerPolicy | None) -> None:
        self._policy = policy
        self._breakers: dict[str, Breaker] = {}

    def begin(self, agent: str) -> bool:
        """A call of an agent is about to be made; whether it is one that finds out how the agent is.

        Raises:
            CircuitOpen: too many calls failed.
        """
        breaker = self._breakers.get(agent)
        if breaker is None:
            return False
        now = time.monotonic()
        wait = breaker.wait(now)
        if wait > 0:
            ended, failed = breaker.told
            raise CircuitOpen(
                f"{failed} of the last {ended} calls of {agent} failed; none is made for {wait:.3g} s", retry_after=wait
            )
        return breaker.begin(now)

    def end(self, agent: str, *, failed: bool, probe: bool) -> None:
        """A call ended."""
        if self._policy is None:
            return
        breaker = self._breakers.get(agent)
        if breaker is None:
            breaker = self._breakers[agent] = Breaker(self._policy)
        breaker.end(time.monotonic(), failed=failed, probe=probe, random=random.random())

    def give_up(self, agent: str, *, probe: bool) -> None:
        """A call ended without telling anything about the agent."""
        if agent in self._breakers:
            self._breakers[agent].give_up(time.monotonic(), probe=probe)

    def open(self) -> list[str]:
        """Agents that may not be called now."""
        now = time.monotonic()
        return [agent for agent, breaker in self._breakers.items() if breaker.wait(now) > 0]
