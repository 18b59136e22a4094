"""What must hold along the whole log of what was decided, whatever crashed meanwhile. For tests and for doubts.

These are the laws of the log itself; those of locks are in `weft.testing.locklog`.

1. Epochs never fall.
2. An epoch begins with the event that names its leader, and has no other such event.
3. Events are numbered 1, 2, 3, … without a gap; no number is given twice.
4. Time does not run backwards within an epoch by more than clocks do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from weft_coordinator.decide.ledger import Event

LED: Final = "led"
"""Kind of the event with which an epoch begins: [led, coordinator]."""
CLOCK: Final = 5_000
"""Milliseconds a clock may be set back."""


class Record(Protocol):
    """One commit as it is stored."""

    @property
    def epoch(self) -> int:
        """Which reign."""
        ...

    @property
    def at(self) -> int:
        """When, unix milliseconds."""
        ...

    @property
    def first(self) -> int:
        """Number of the first event."""
        ...

    @property
    def events(self) -> Sequence[Event]:
        """What was decided."""
        ...


class Laws:
    """Takes the commits in the order of the log; `violations` says which law was broken where.

    Args:
        first: Number of the first event to come; what is before it was let go of after a snapshot.
    """

    def __init__(self, first: int = 1) -> None:
        self.violations: list[str] = []
        self._next = first
        self._epoch = 0
        self._at = 0

    def take(self, commit: Record) -> None:
        """The next commit."""
        began = commit.epoch != self._epoch
        if commit.epoch < self._epoch:
            self._broken(1, f"epoch {commit.epoch} after epoch {self._epoch}", commit)
        leaders = [n for n, event in enumerate(commit.events) if event[0] == LED]
        if leaders != ([0] if began else []) and self._epoch:
            self._broken(2, f"epoch {commit.epoch} is led from its events {leaders}", commit)
        if commit.first != self._next:
            self._broken(3, f"number {commit.first} follows {self._next - 1}", commit)
        if not began and commit.at < self._at - CLOCK:
            self._broken(4, f"decided at {commit.at} after {self._at}", commit)
        self._epoch, self._at = commit.epoch, commit.at
        self._next = commit.first + len(commit.events)

    def _broken(self, law: int, what: str, commit: Record) -> None:
        self.violations.append(f"law {law}: {what} (commit of events {commit.first} to {self._last(commit)})")

    @staticmethod
    def _last(commit: Record) -> int:
        return commit.first + len(commit.events) - 1


def violations(commits: Iterable[Record]) -> list[str]:
    """Laws broken by a log, from its first commit on."""
    laws: Laws | None = None
    for commit in commits:
        laws = laws or Laws(commit.first)
        laws.take(commit)
    return laws.violations if laws is not None else []
