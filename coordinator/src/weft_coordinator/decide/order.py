"""The order in which the tasks of an agent were accepted, context by context, as far as they have not ended."""

from __future__ import annotations

from collections.abc import Iterable

from weft_coordinator.decide.index import Entry, TaskIndex
from weft_protocols.subjects import OPERATOR


class Order:
    """Unfinished tasks by agent and context, in the order of their creating messages.

    Args:
        index: Where the tasks are. `changed` is told what moved in it; what came into it in another way is looked up.
    """

    def __init__(self, index: TaskIndex) -> None:
        self._index = index
        self._generation = -1
        self._queues: dict[tuple[str, str], dict[tuple[str, str], int]] = {}

    def before(self, agent: str, context: str, seq: int) -> tuple[str, ...]:
        """Tasks of a context that were accepted before sequence `seq` and have not ended; the first one first."""
        if self._generation != self._index.generation:
            self._load()
        queue = self._queues.get((agent, context), {})
        return tuple(task for (_, task), sequence in queue.items() if sequence < seq)

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def changed(self, entries: Iterable[Entry]) -> None:
        """Take tasks that are new or came into another state, in the order in which that happened."""
        for entry in entries:
            place, key = (entry.agent, entry.context), (entry.caller, entry.task)
            if not entry.ended:
                if entry.created:
                    self._queues.setdefault(place, {}).setdefault(key, entry.first)
                continue
            queue = self._queues.get(place)
            if queue is not None:
                queue.pop(key, None)
                if not queue:
                    del self._queues[place]

    def _load(self) -> None:
        self._generation = self._index.generation
        self._queues.clear()
        self.changed(sorted(self._index.visible(OPERATOR), key=lambda entry: entry.first))
