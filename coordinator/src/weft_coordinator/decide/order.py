"""The order in which the tasks of an agent were accepted, context by context, as far as they have not ended."""

from __future__ import annotations

from weft_coordinator.decide.index import Entry


class Order:
    """Unfinished tasks by agent and context, in the order of their creating messages. Follows a task index."""

    def __init__(self) -> None:
        self._queues: dict[tuple[str, str], dict[tuple[str, str], int]] = {}

    def before(self, agent: str, context: str, seq: int) -> tuple[str, ...]:
        """Tasks of a context that were accepted before sequence `seq` and have not ended; the first one first."""
        queue = self._queues.get((agent, context), {})
        return tuple(task for (_, task), sequence in queue.items() if sequence < seq)

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    # Following ---------------------------------------------------------------------------------

    def created(self, entry: Entry, seq: int) -> None:
        """A task was accepted: creating messages are read in their order."""
        if not entry.ended:
            self._queues.setdefault((entry.agent, entry.context), {})[entry.caller, entry.task] = seq

    def moved(self, entry: Entry) -> None:
        """A task that has ended stands in nobody's way."""
        if not entry.ended:
            return
        place = (entry.agent, entry.context)
        queue = self._queues.get(place)
        if queue is not None:
            queue.pop((entry.caller, entry.task), None)
            if not queue:
                del self._queues[place]

    def cleared(self) -> None:
        """Everything is read anew."""
        self._queues.clear()
