"""A request for locks: as it is asked, as it is kept, and the events of its life."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from weft_coordinator.decide.ledger import Event
from weft_protocols.errors import FieldViolation, InvalidParams

MODES: Final = ("exclusive", "shared")
MAX_NAMES: Final = 64
MAX_NAME: Final = 256

ASKED: Final = "lock.asked"
"""(kind, agent, replica, task, request, claim, names, exclusive, chain, lease, priority, work, created): queued."""
TAKEN: Final = "lock.taken"
"""The same fields: granted at once."""
GRANTED: Final = "lock.granted"
"""(kind, agent, request): it waited."""
PROMISED: Final = "lock.promised"
"""(kind, agent, request, after): next once the request `after` of its replica lets go; the number will be its token."""
RECALLED: Final = "lock.recalled"
"""(kind, agent, request): what was promised does not hold any more; it waits on."""
MOVED: Final = "lock.moved"
"""(kind, agent, request, replica, claim): a newer claim took it over; if held, the number is its new token."""
FREED: Final = "lock.freed"
"""(kind, agent, request, why): `released`, `ended` or `superseded`; held or waiting."""
LOST: Final = "lock.lost"
"""(kind, agent, request, why, reason): `expired`, `forced` or `deadlock`."""
CHOSEN: Final = "lock.chosen"
"""(kind, task): gave way in a deadlock once more."""
CLOSED: Final = "lock.closed"
"""(kind, task): ended, so that how often it gave way is forgotten."""

WAITING, HELD, GONE = 0, 1, 2
NEW: Final = 1 << 62
"""Place of a request that has none yet: behind everybody."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for locks, as it is asked."""

    agent: str
    replica: str
    task: str
    """The caller vouches that it is a task of the agent."""
    request: str
    """The same in every attempt of the task; unique for the agent."""
    claim: int
    names: tuple[str, ...]
    mode: str = "exclusive"
    reentrant: bool = False
    lease: float = 0.0
    """Seconds, kept for the caller; 0 is its default."""
    priority: int = 0
    work: int = 0
    created: int = 0


class Request:
    """A request that holds or waits. Read it; only the ledger changes it."""

    __slots__ = (
        "after", "agent", "asked", "chain", "claim", "created", "exclusive", "lease", "names", "number",
        "priority", "promised", "replica", "request", "since", "state", "task", "token", "work",
    )  # fmt: skip

    def __init__(self, fields: Sequence[Any], *, number: int = NEW, at: int = 0) -> None:
        names: Sequence[str]
        chain: Sequence[str]
        (
            self.agent, self.replica, self.task, self.request, self.claim, names, self.exclusive, chain,
            self.lease, self.priority, self.work, self.created,
        ) = fields  # fmt: skip
        self.names: tuple[str, ...] = tuple(names)
        self.chain: tuple[str, ...] = tuple(chain)
        """Tasks whose holds it re-enters: its own and its ancestors'. Empty if it is not re-entrant."""
        self.number = number
        """Its place in the queues: the number of the event by which it was asked."""
        self.asked = at
        """Unix ms."""
        self.since = 0
        """When it was granted, unix ms; 0 while it waits."""
        self.token = 0
        """The fencing token; 0 while it waits."""
        self.promised = 0
        """The token it will have; 0 where nothing is promised, and once it holds."""
        self.after = ""
        """The request of the same replica that has to let go first, where it is promised."""
        self.state = WAITING

    @property
    def held(self) -> bool:
        """Whether it holds its names."""
        return self.state == HELD

    @property
    def waits(self) -> bool:
        """Whether it is in the queues."""
        return self.state == WAITING

    @property
    def mode(self) -> str:
        """`exclusive` or `shared`."""
        return MODES[0] if self.exclusive else MODES[1]

    def __repr__(self) -> str:
        return f"<{self.task}/{self.request} {self.mode} {self.names} {('waits', 'holds', 'gone')[self.state]}>"

    def fields(self) -> list[Any]:
        """Its fields as in an event."""
        return [
            self.agent, self.replica, self.task, self.request, self.claim, self.names, self.exclusive, self.chain,
            self.lease, self.priority, self.work, self.created,
        ]  # fmt: skip


Change = tuple[str, str, str, str, str]
"""(agent, request, what, why, reason): what is `waiting`, `granted`, `promised`, `recalled`, `moved`, `freed` or
`lost`."""


def changes(events: Iterable[Event]) -> list[Change]:
    """What a decision means to those who asked, in order."""
    told: list[Change] = []
    for event in events:
        kind = event[0]
        if kind in (ASKED, TAKEN):
            told.append((event[1], event[4], "waiting" if kind == ASKED else "granted", "", ""))
        elif kind == GRANTED:
            told.append((event[1], event[2], "granted", "", ""))
        elif kind in (PROMISED, RECALLED, MOVED):
            told.append((event[1], event[2], kind.removeprefix("lock."), "", ""))
        elif kind == FREED:
            told.append((event[1], event[2], "freed", event[3], ""))
        elif kind == LOST:
            told.append((event[1], event[2], "lost", event[3], event[4]))
    return told


def check(ask: Ask) -> None:
    """Whether the request can be kept at all.

    Raises:
        InvalidParams: a field is wrong; it says which, and why.
    """
    if ask.mode not in MODES:
        raise _invalid("mode", f"is {ask.mode!r}; a lock is exclusive or shared")
    for field, value in (("task", ask.task), ("request", ask.request)):
        if not value:
            raise _invalid(field, "is empty")
    names_of(ask.names)


def names_of(value: Any) -> tuple[str, ...]:
    """The names of a request, from whatever came over the wire.

    Raises:
        InvalidParams: it is no list of 1 to 64 different printable names of 1 to 256 characters; it says which.
    """
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_NAMES:
        what = f"are {len(value)}" if isinstance(value, list | tuple) else "are missing or no list"
        raise _invalid("names", f"{what}; a request has 1 to {MAX_NAMES} names")
    for i, name in enumerate(value):
        if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME:
            what = f"has {len(name)} characters" if isinstance(name, str) else f"is {name!r}"
            raise _invalid(f"names[{i}]", f"{what}; a name is text of 1 to {MAX_NAME} characters")
        if not name.isprintable():
            wrong = next(c for c in name if not c.isprintable())
            raise _invalid(f"names[{i}]", f"contains U+{ord(wrong):04X}; a name is printable text")
    if len(set(value)) != len(value):
        twice = next(i for i, name in enumerate(value) if name in value[:i])
        raise _invalid(f"names[{twice}]", f"{value[twice]!r} is in the request already; name it once")
    return tuple(value)


def _invalid(field: str, description: str) -> InvalidParams:
    return InvalidParams(f"{field} {description}", violations=(FieldViolation(field, description),))
