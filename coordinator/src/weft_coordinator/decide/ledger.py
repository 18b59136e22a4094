"""What the coordinator's log is folded into.

The log is a sequence of events, numbered 1, 2, 3, …; the state is several ledgers, each a fold of the kinds of events
it names. So a leader that takes over knows what its predecessor had decided, and nothing else has to be kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias

Event: TypeAlias = tuple[Any, ...]
"""Something that was decided: its kind, then values that msgpack can carry. Lists inside come back as lists."""


class Ledger(Protocol):
    """A fold of some kinds of events. Deterministic: the same events give the same ledger."""

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of events it takes; no two ledgers share one."""
        ...

    def apply(self, event: Event, *, number: int, at: int) -> None:
        """Take an event. `number` is its place in the log, `at` when it was decided, unix milliseconds."""
        ...

    def dump(self) -> Any:
        """Everything in it, as values msgpack can carry."""
        ...

    def load(self, dumped: Any) -> None:
        """Be what `dump` gave; None empties it."""
        ...


class Ledgers:
    """Several ledgers as one.

    Raises:
        ValueError: two of them take the same kind of event.
    """

    def __init__(self, ledgers: Iterable[Ledger]) -> None:
        self._ledgers = tuple(ledgers)
        self._by_kind: dict[str, Ledger] = {}
        for ledger in self._ledgers:
            for kind in ledger.kinds:
                if kind in self._by_kind:
                    raise ValueError(f"two ledgers take events of kind {kind!r}")
                self._by_kind[kind] = ledger

    def apply(self, event: Event, *, number: int, at: int) -> bool:
        """Hand an event to the ledger that takes its kind; False if none does: another version wrote it."""
        ledger = self._by_kind.get(event[0])
        if ledger is None:
            return False
        ledger.apply(event, number=number, at=at)
        return True

    def dump(self) -> list[Any]:
        """All of them, each by one of its kinds, so that another version finds what it knows."""
        return [[min(ledger.kinds), ledger.dump()] for ledger in self._ledgers]

    def load(self, dumped: list[Any] | None) -> None:
        """Be what `dump` gave; None empties them all."""
        told = dict(dumped or ())
        for ledger in self._ledgers:
            found = [told[kind] for kind in ledger.kinds if kind in told]
            ledger.load(found[0] if found else None)
