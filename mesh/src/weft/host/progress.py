"""Which tasks of a replica make no progress, for its report to the coordinator."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from weft.host.run import Run

REPORTED: Final = 100
"""Tasks of one report at most, the ones that have stood still for longest."""
Stalled = tuple[str, int, str]
"""Task id, unix milliseconds of its last progress, what it is at."""


@contextmanager
def step(run: Run, key: str) -> Iterator[None]:
    """A step's body runs inside. That it begins is progress, and so is its record."""
    run.steps[key] = time.time()
    try:
        yield
    finally:
        run.steps.pop(key, None)


def stalled(runs: Iterable[Run], budget: float, *, now: float) -> list[Stalled]:
    """Tasks without an event, or a step that begins or ends, for more than `budget` seconds before `now` (unix).

    One that waits for a child, an answer, a timer, a lock or a slot is not among them: it holds no slot.
    """
    late = ((since, run) for run in runs if _works(run) and (since := _since(run)) < now - budget)
    worst = heapq.nsmallest(REPORTED, late, key=lambda found: found[0])
    return [(run.task_id, int(since * 1000), _at(run)) for since, run in worst]


def _works(run: Run) -> bool:
    return run.slot.held and not run.ended and not run.log.last_state.interrupted


def _since(run: Run) -> float:
    return max(run.last_progress, run.slot.since, *run.steps.values())


def _at(run: Run) -> str:
    """The step that has run for longest, else the handler."""
    if not run.steps:
        return "its handler"
    return f"step {min(run.steps, key=run.steps.__getitem__)[:100]!r}"


__all__ = ["REPORTED", "Stalled", "stalled", "step"]
