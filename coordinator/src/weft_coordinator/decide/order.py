"""The order in which the tasks of an agent were accepted, context by context, as far as they have not ended."""

from __future__ import annotations

from collections.abc import Iterable

from weft_coordinator.decide.index import Entry, TaskIndex
from weft_protocols import subjects


class Order:
    """Unfinished tasks by agent and context, in the order of their creating messages.

    Args:
        index: Where they are from. `changed` tells what it learnt since; where it was made anew, all of it is taken.
    """

    def __init__(self, index: TaskIndex) -> None:
        self._index = index
        self._age: object = None
        self._queues: dict[tuple[str, str], dict[tuple[str, str], int]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def before(self, agent: str, context: str, task: str) -> tuple[str, ...] | None:
        """Tasks of a context that were accepted before this one and have not ended; the first one first.

        None where the task itself is not known yet: then nothing is known of what was accepted before it.
        """
        self._settle()
        queue = self._queues.get((agent, context), {})
        own = min((sequence for (_, one), sequence in queue.items() if one == task), default=0)
        if not own:
            entry = self._index.find(agent, task, caller=subjects.OPERATOR)
            return () if entry is not None and entry.ended else None
        earlier = sorted((sequence, one) for (_, one), sequence in queue.items() if sequence < own)
        return tuple(one for _, one in earlier)

    def changed(self, entries: Iterable[Entry]) -> None:
        """Tasks are new, or came into another state."""
        self._settle()
        for entry in entries:
            self._take(entry)

    def _settle(self) -> None:
        if self._age is not self._index.age:
            self._age = self._index.age
            self._queues.clear()
            for entry in self._index.visible(subjects.OPERATOR):
                self._take(entry)

    def _take(self, entry: Entry) -> None:
        place, who = (entry.agent, entry.context), (entry.caller, entry.task)
        if not entry.ended:
            if entry.created:
                self._queues.setdefault(place, {}).setdefault(who, entry.first)
            return
        queue = self._queues.get(place)
        if queue is not None:
            queue.pop(who, None)
            if not queue:
                del self._queues[place]
