"""Which finished tasks may leave the stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weft_coordinator.decide.index import Entry


@dataclass(frozen=True, slots=True)
class Rule:
    """What holds a task in the stream."""

    before: int
    """Unix nanoseconds: tasks that ended later stay."""
    stored: int
    """Sequence up to which every coordinator has the stream in its file: what is beyond stays."""
    held: Callable[[Entry], bool]
    """Whether a finished task is still needed by another: its parent is at work and may ask for it again."""

    def stays(self, entry: Entry) -> bool:
        """Whether a task must stay."""
        return not entry.ended or entry.last_time > self.before or entry.last > self.stored or self.held(entry)


@dataclass(frozen=True, slots=True)
class Prefix:
    """The begin of a stream in which nothing has to stay."""

    row: int
    """The last task that is gone with it."""
    until: int
    """Sequence of the first message that stays; 0 if nothing can go."""
    whole: bool
    """Whether all tasks that were looked at can go."""
    cut: tuple[Entry, ...] = ()
    """Of the tasks that can go, those that have messages behind it."""


def prefix(entries: Sequence[Entry], rule: Rule, *, all: bool) -> Prefix:
    """How much of the stream can go at once.

    Args:
        entries: Tasks that follow each other, in the order of their first messages.
        rule: What holds.
        all: Whether these are the last ones there are.
    """
    gone: list[Entry] = []
    staying: Entry | None = None
    for entry in entries:
        if rule.stays(entry):
            staying = entry
            break
        gone.append(entry)
    if staying is not None:
        until = staying.first
    elif all or not gone:
        until = max((entry.last for entry in gone), default=-1) + 1
    else:
        # Behind the first message of the last one there may be those of others that follow.
        until = gone[-1].first + 1
    until = min(until, rule.stored + 1)
    cut = tuple(entry for entry in gone if entry.last >= until)
    return Prefix(gone[-1].row if gone else 0, until, whole=staying is None, cut=cut)


def single(entries: Sequence[Entry], rule: Rule) -> list[Entry]:
    """Tasks that can go one by one, since others before them stay."""
    return [entry for entry in entries if not rule.stays(entry)]
