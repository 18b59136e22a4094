"""Tasks that start by the clock: which schedules the broker has been given, and when each was last started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from weft_coordinator.decide.ledger import Event

SCHEDULED: Final = "scheduled"
"""[scheduled, name, what it says as a JSON object]: the broker is about to be given it."""
UNSCHEDULED: Final = "unscheduled"
"""[unscheduled, name]: the broker does not have it any more."""
STARTED: Final = "started"
"""[started, name, due, task]: the task of a time, unix milliseconds, is accepted."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One schedule."""

    told: Mapping[str, Any]
    """What it says, as it is in the broker."""
    since: int
    """When it was decided, unix milliseconds."""
    last: int = 0
    """Unix milliseconds of the last time a task was started for; 0 for none."""
    task: str = ""
    """That task."""


class Schedules:
    """The ledger of schedules."""

    kinds = frozenset({SCHEDULED, UNSCHEDULED, STARTED})

    def __init__(self) -> None:
        self.load(None)

    @property
    def all(self) -> Mapping[str, Scheduled]:
        """By name."""
        return self._schedules

    def change(self, wanted: Mapping[str, Mapping[str, Any]]) -> tuple[list[Event], list[str]]:
        """What to decide before the broker is changed, and the names of schedules that it must not have any more."""
        events: list[Event] = []
        for name, told in wanted.items():
            known = self._schedules.get(name)
            if known is None or dict(known.told) != dict(told):
                events.append((SCHEDULED, name, dict(told)))
        return events, [name for name in self._schedules if name not in wanted]

    def started(self, name: str, due: int, task: str) -> list[Event]:
        """What to decide once the task of a time is accepted."""
        known = self._schedules.get(name)
        return [(STARTED, name, due, task)] if known is not None and due > known.last else []

    def apply(self, event: Event, *, number: int, at: int) -> None:
        """Take an event."""
        kind, name, *values = event
        known = self._schedules.get(name)
        if kind == SCHEDULED:
            self._schedules[name] = (
                Scheduled(values[0], at, known.last, known.task) if known else Scheduled(values[0], at)
            )
        elif kind == UNSCHEDULED:
            self._schedules.pop(name, None)
        elif known is not None:
            self._schedules[name] = replace(known, last=values[0], task=values[1])

    def dump(self) -> Any:
        """Every schedule."""
        return [[name, dict(one.told), one.since, one.last, one.task] for name, one in self._schedules.items()]

    def load(self, dumped: Any) -> None:
        """Be what `dump` gave."""
        self._schedules: dict[str, Scheduled] = {
            name: Scheduled(told, since, last, task) for name, told, since, last, task in dumped or ()
        }
