"""Incidents: what the coordinator's watchdog found. For the operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weft.client.coordinator import TIMEOUT, _Told, call
from weft.core.broker import Broker


@dataclass(frozen=True, slots=True)
class Incident(_Told):
    """Something that is or was wrong. Times are unix milliseconds."""

    id: int
    key: str
    """The rule and what it is about, e.g. `no-progress:analyst`."""
    severity: str
    """`info`, `warning` or `critical`."""
    title: str
    cause: str = ""
    command: str = ""
    """What to run next."""
    state: str = "open"
    """`open` or `cleared`."""
    opened: int = 0
    last_seen: int = 0
    cleared: int = 0
    """0 while it is open."""
    agents: Sequence[str] = ()
    tasks: Sequence[str] = ()
    """Some of the tasks it is about."""
    count: int = 0
    """How many tasks or replicas it is about."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """Who was told: by target, the severity and what was said last."""


@dataclass(frozen=True, slots=True)
class Watch:
    """What the watchdog says."""

    incidents: tuple[Incident, ...]
    """The last one first."""
    total: int
    """How many fit, shown or not."""
    open: int
    """How many are open."""
    watching: bool
    """Whether it looks at all."""
    alerts: tuple[Mapping[str, Any], ...] = ()
    """Who is told: target, min_severity, sent, failed, problem."""


async def incidents(broker: Broker, *, everything: bool = False, limit: int = 100, timeout: float = TIMEOUT) -> Watch:
    """Open incidents, or with `everything` the cleared ones too: the last one first, at most `limit` (up to 1000).

    Raises:
        PermissionDenied: not as the operator.
        Unavailable: no coordinator leads.
    """
    body = {"state": "all" if everything else "open", "limit": limit}
    return _watch(await call(broker, "incidents", body, timeout=timeout))


async def incident(broker: Broker, id: int, *, timeout: float = TIMEOUT) -> Incident:
    """One incident. InvalidParams if there is none of that id, and what `incidents` raises."""
    return _watch(await call(broker, "incidents", {"id": id}, timeout=timeout)).incidents[0]


def _watch(answer: Mapping[str, Any]) -> Watch:
    return Watch(
        tuple(Incident.of(one) for one in answer["incidents"]),
        answer["total"],
        answer["open"],
        answer["watching"],
        tuple(answer.get("alerts", ())),
    )
