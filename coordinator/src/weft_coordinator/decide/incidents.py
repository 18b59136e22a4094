"""Incidents: the ledger of what was wrong, from when to when, and who was told.

Events: `("incident-opened", facts)`, `("incident-changed", id, facts)`, `("incident-cleared", id)`,
`("incident-notified", id, target, what, severity)`. The id of an incident is the number of the event that opened it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from weft_coordinator.decide.ledger import Event
from weft_coordinator.decide.watchdog import SEVERITIES, Finding

OPENED: Final = "incident-opened"
CHANGED: Final = "incident-changed"
CLEARED: Final = "incident-cleared"
NOTIFIED: Final = "incident-notified"
KEPT: Final = 1000
"""Cleared incidents that are remembered."""
UPDATE_EVERY: Final = 60_000
"""Milliseconds between two records of an incident's facts while only counts and words change."""
_FACTS: Final = ("kind", "about", "severity", "title", "cause", "command", "agents", "tasks", "count")


@dataclass(frozen=True, slots=True)
class Incident:
    """Something that was wrong. Times are unix milliseconds."""

    id: int
    finding: Finding
    """As it was recorded last."""
    opened: int
    recorded: int
    """When `finding` was."""
    cleared: int = 0
    """0 while it is open."""
    told: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """By target: the severity it was told of, and the last it was told: `opened`, `escalated` or `cleared`."""

    @property
    def key(self) -> str:
        """The finding's."""
        return self.finding.key

    @property
    def severity(self) -> str:
        """The finding's."""
        return self.finding.severity

    def show(self, latest: tuple[Finding, int] | None = None) -> dict[str, Any]:
        """As the coordinator answers; `latest` is how and when it was last found."""
        finding, seen = latest if latest is not None and not self.cleared else (self.finding, 0)
        told = facts(replace(finding, severity=self.severity))
        del told["kind"], told["about"]
        return {
            "id": self.id,
            "key": self.key,
            **told,
            "state": "cleared" if self.cleared else "open",
            "opened": self.opened,
            "last_seen": max(self.recorded, seen),
            "cleared": self.cleared,
            "told": {target: list(told) for target, told in self.told.items()},
        }


class Incidents:
    """The ledger: every open incident and the last `KEPT` cleared ones."""

    kinds: frozenset[str] = frozenset({OPENED, CHANGED, CLEARED, NOTIFIED})

    def __init__(self) -> None:
        self._open: dict[str, Incident] = {}
        self._cleared: OrderedDict[int, Incident] = OrderedDict()

    @property
    def open(self) -> Mapping[str, Incident]:
        """Open incidents by key."""
        return self._open

    @property
    def cleared(self) -> Collection[Incident]:
        """Cleared incidents, the one that was cleared first at the beginning."""
        return self._cleared.values()

    def find(self, id_: int) -> Incident | None:
        """The incident with an id."""
        return self._cleared.get(id_) or next((one for one in self._open.values() if one.id == id_), None)

    def apply(self, event: Event, *, number: int, at: int) -> None:
        """Fold one event. One about an unknown incident changes nothing: it was forgotten."""
        kind, *rest = event
        if kind == OPENED:
            incident = Incident(number, _finding(rest[0]), at, at)
            self._open[incident.key] = incident
            return
        incident_ = self.find(int(rest[0]))
        if incident_ is None:
            return
        if kind == CHANGED:
            self._put(replace(incident_, finding=_finding(rest[1]), recorded=at))
        elif kind == CLEARED:
            self._open.pop(incident_.key, None)
            self._put(replace(incident_, cleared=at))
        elif kind == NOTIFIED:
            _, target, what, severity = rest
            self._put(replace(incident_, told={**incident_.told, target: (severity, what)}))

    def _put(self, incident: Incident) -> None:
        if not incident.cleared:
            self._open[incident.key] = incident
            return
        self._cleared[incident.id] = incident
        while len(self._cleared) > KEPT:
            self._cleared.popitem(last=False)

    def dump(self) -> Any:
        """The whole state."""
        return [
            [one.id, facts(one.finding), one.opened, one.recorded, one.cleared, dict(one.told)]
            for one in (*self._cleared.values(), *self._open.values())
        ]

    def load(self, dumped: Any) -> None:
        """Take a dumped state in place of this one."""
        self._open, self._cleared = {}, OrderedDict()
        for id_, told, opened, recorded, cleared, targets in dumped or ():
            known = {str(target): (str(said[0]), str(said[1])) for target, said in targets.items()}
            self._put(Incident(id_, _finding(told), opened, recorded, cleared, known))


def facts(finding: Finding) -> dict[str, Any]:
    """A finding as it stands in events."""
    return {**asdict(finding), "agents": list(finding.agents), "tasks": list(finding.tasks)}


def _finding(told: Mapping[str, Any]) -> Finding:
    values = {name: told[name] for name in _FACTS if name in told}
    return Finding(**{**values, "agents": tuple(told.get("agents", ())), "tasks": tuple(told.get("tasks", ()))})


class Judge:
    """Turns what is found at each look into incidents that do not flap.

    An incident opens when its finding is first seen, gets worse at once, and gets better or is cleared only after
    that has lasted for `clear_after` seconds. What a new leader has not seen yet counts as seen when it began.
    """

    def __init__(self, clear_after: float, *, since: int) -> None:
        self._patience = int(clear_after * 1000)
        self._since = since
        self._seen: dict[str, int] = {}
        self._as_bad: dict[str, int] = {}
        self._latest: dict[str, Finding] = {}

    def latest(self, key: str) -> tuple[Finding, int] | None:
        """A finding as it was last seen, and when: unix milliseconds."""
        found = self._latest.get(key)
        return None if found is None else (found, self._seen[key])

    def look(self, found: Iterable[Finding], ledger: Incidents, now: int) -> Sequence[Event]:
        """The events that make the ledger agree with what was found at `now`."""
        events: list[Event] = []
        current = {finding.key: finding for finding in found}
        for key in sorted(current):
            finding, incident = current[key], ledger.open.get(key)
            self._seen[key] = now
            self._latest[key] = finding
            if incident is None:
                self._as_bad[key] = now
                events.append((OPENED, facts(finding)))
            elif (change := self._change(incident, finding, now)) is not None:
                events.append((CHANGED, incident.id, facts(change)))
        for key, incident in ledger.open.items():
            if key not in current and now - self._seen.setdefault(key, self._since) >= self._patience:
                events.append((CLEARED, incident.id))
                self._seen.pop(key, None)
                self._latest.pop(key, None)
                self._as_bad.pop(key, None)
        return events

    def _change(self, incident: Incident, finding: Finding, now: int) -> Finding | None:
        """What to record of an open incident, if anything."""
        was, is_ = SEVERITIES.index(incident.severity), SEVERITIES.index(finding.severity)
        if is_ >= was:
            self._as_bad[incident.key] = now
            if is_ > was:
                return finding
        elif now - self._as_bad.setdefault(incident.key, self._since) >= self._patience:
            self._as_bad[incident.key] = now
            return finding
        kept = replace(finding, severity=incident.severity)
        if kept == incident.finding or now - incident.recorded < UPDATE_EVERY:
            return None
        return kept


RECENT: Final = 3_600_000
"""Milliseconds in which a cleared incident that nobody could be told of is still news."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something to tell one target about one incident."""

    incident: Incident
    what: str
    """`opened`, `escalated` or `cleared`."""

    def event(self, target: str) -> Event:
        """The record that it was told."""
        return (NOTIFIED, self.incident.id, target, self.what, self.incident.severity)


def notices(ledger: Incidents, target: str, min_severity: str, now: int) -> list[Notice]:
    """What a target has not been told yet: each incident when it opens, gets worse, and is over."""
    least = SEVERITIES.index(min_severity)
    due: list[Notice] = []
    for incident in (*ledger.cleared, *ledger.open.values()):
        told = incident.told.get(target)
        bad = SEVERITIES.index(incident.severity)
        if incident.cleared:
            fresh = told is None and bad >= least and now - incident.cleared < RECENT
            if fresh or (told is not None and told[1] != "cleared"):
                due.append(Notice(incident, "cleared"))
        elif bad >= least and told is None:
            due.append(Notice(incident, "opened"))
        elif told is not None and bad > SEVERITIES.index(told[0]):
            due.append(Notice(incident, "escalated"))
    return due
