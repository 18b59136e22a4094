"""Who was heard of and when. Kept in memory only: signs of life come again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from weft_coordinator.decide.watchdog import Stall

STALE_AFTER: Final = 6_000
"""Milliseconds without a sign of life after which a replica is stale."""
GONE_AFTER: Final = 60_000
"""Milliseconds after which it counts as gone."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a replica last said of itself."""

    state: str
    """`ready` or `draining`."""
    active: int
    """Tasks it owns."""
    waiting: int
    """Of these, the ones that hold no slot."""
    slots: int
    done: int
    failed: int
    last_progress: int
    """Unix milliseconds of its last event, step or result; 0 for none."""
    heard: int
    """Unix milliseconds, this coordinator's clock."""
    stalled: tuple[Stall, ...] = ()
    """Its tasks that make no progress."""


class Presence:
    """Signs of life by agent and replica. `since` is when this coordinator began to listen, unix milliseconds."""

    def __init__(self, since: int) -> None:
        self._since = since
        self._heard: dict[tuple[str, str], Heartbeat] = {}

    def heard(self, agent: str, replica: str, heartbeat: Heartbeat) -> None:
        """Take a sign of life."""
        self._heard[agent, replica] = heartbeat

    def last(self, agent: str, replica: str) -> Heartbeat | None:
        """What a replica last said of itself."""
        return self._heard.get((agent, replica))

    def forget(self, agent: str, replica: str | None = None) -> None:
        """Forget a replica that left, or all of an agent."""
        for key in [key for key in self._heard if key[0] == agent and replica in (None, key[1])]:
            del self._heard[key]

    def state(self, agent: str, replica: str, *, registered: int, now: int) -> str:
        """`ready`, `draining`, `stale` or `gone`; `unknown` for one not heard of since this coordinator began.

        A registration, at `registered` unix milliseconds, is a sign of life too.
        """
        last = self._heard.get((agent, replica))
        silent = self.silent(agent, replica, registered=registered, now=now)
        if silent > GONE_AFTER:
            return "gone"
        if silent > STALE_AFTER:
            return "stale"
        if last is not None:
            return last.state
        return "ready" if now - registered <= STALE_AFTER else "unknown"

    def silent(self, agent: str, replica: str, *, registered: int, now: int) -> int:
        """Milliseconds since a replica registered, was heard of, or could have been heard of."""
        last = self._heard.get((agent, replica))
        return now - max(registered, last.heard if last is not None else self._since)

    def stalled(self, agent: str, replica: str) -> tuple[Stall, ...]:
        """Tasks without progress, as the replica said last."""
        last = self._heard.get((agent, replica))
        return last.stalled if last is not None else ()

    def show(self, agent: str, replica: str, *, registered: int) -> dict[str, Any]:
        """What the replica last said, for the operator, and when: `last_seen` in unix milliseconds."""
        last = self._heard.get((agent, replica))
        if last is None:
            return {"last_seen": registered}
        said = asdict(last)
        del said["state"]
        return {**said, "last_seen": max(registered, said.pop("heard"))}
