"""Tasks that wait for long leave memory: what has to happen before, and when.

A task that waits for nothing but answers needs nobody: the answer itself wakes it. What waits for a timer, for
children, for an approval or for its deadline is woken by the coordinator, so it leaves only once the coordinator has
recorded what for. Without one it stays, holds no slot, and asks again later.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping
from typing import Any, Final

from weft.client import coordinator
from weft.host.owner import Owner
from weft.host.run import Run, Stop
from weft.host.waits import Wait, Waits
from weft_protocols.errors import WeftError

log = logging.getLogger("weft.host")

WORTH: Final = 1.0
"""Seconds a task must have left to wait, as far as is known, for leaving memory to be worth it."""
AGAIN: Final = 5.0
"""Seconds until the coordinator is asked again when it did not answer; up to twice that, by chance."""
NEVER: Final = 250_000_000_000.0
"""Unix seconds that are as good as never."""
AT_ONCE: Final = 64
"""Requests under way at a time."""


class Parking:
    """The tasks of one replica that wait, and when each may leave."""

    def __init__(self, replica: Owner) -> None:
        self._replica = replica
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._room = asyncio.Semaphore(AT_ONCE)

    def __call__(self, waits: Waits, wait: Wait, opened: bool) -> None:
        """A wait began or ended."""
        task_id = waits.task_id
        if not waits.all:
            self.forget(task_id)
        elif task_id not in self._timers and wait.kind != "order":
            self._later(task_id, self._replica.agent.suspend_after)

    def forget(self, task_id: str) -> None:
        """A task is not here any more, or waits for nothing."""
        timer = self._timers.pop(task_id, None)
        if timer is not None:
            timer.cancel()

    def close(self) -> None:
        """Let nothing leave any more."""
        for task_id in list(self._timers):
            self.forget(task_id)

    def _later(self, task_id: str, seconds: float) -> None:
        self.forget(task_id)
        self._timers[task_id] = asyncio.get_running_loop().call_later(seconds, self._look, task_id)

    def _look(self, task_id: str) -> None:
        """Whether a task has only waited for long enough by now."""
        self._timers.pop(task_id, None)
        run = self._replica.live.get(task_id)
        if run is None or run.stop is not None or run.ended or not run.waits.all:
            return
        pause = self._replica.agent.suspend_after
        quiet = asyncio.get_running_loop().time() - run.waits.since
        if not run.waits.parkable or run.conversation is not None or _soon(run):
            self._later(task_id, max(pause, WORTH))
        elif quiet < pause:
            self._later(task_id, pause - quiet)
        else:
            self._replica.background(self._park(run), name=f"parking of task {task_id}")

    async def _park(self, run: Run) -> None:
        before = run.waits.changes
        asked = _request(run)
        if asked is not None:
            try:
                async with self._room:
                    await coordinator.call(self._replica.broker, "park", asked)
            except WeftError as error:
                log.debug("task %s stays in memory: %s", run.task_id, error)
                if self._replica.live.get(run.task_id) is run and run.waits.all:
                    self._later(run.task_id, AGAIN * (1.0 + random.random()))
                return
        if self._replica.live.get(run.task_id) is not run or not run.waits.all:
            return
        if run.waits.changes != before:
            self._later(run.task_id, self._replica.agent.suspend_after)
            return
        question = next((wait for wait in run.waits.all if wait.kind == "answer"), None)
        run.waiting = (question or run.waits.all[0]).key
        run.asked = question.asked if question is not None else max((one.sequence for one in run.inbox), default=0)
        run.interrupt(Stop.SUSPEND)


def _soon(run: Run) -> bool:
    """Whether a wait ends before leaving memory is worth it."""
    ends = [wait.until for wait in run.waits.all if wait.until is not None]
    return bool(ends) and min(ends) - time.time() < WORTH


def _request(run: Run) -> Mapping[str, Any] | None:
    """What the coordinator is asked to wake a task for; None where an answer alone does."""
    waits = run.waits.all
    ends = [wait.until for wait in waits if wait.until is not None]
    if run.work.deadline is not None:
        ends.append(run.work.deadline)
    children = _children(run, waits)
    approvals = [target for wait in waits if wait.kind == "approval" for target in wait.targets]
    if not ends and not children and not approvals:
        return None
    return {
        "task": run.task_id,
        "caller": run.work.caller,
        "context": run.work.context_id,
        "slice": run.work.slice,
        "claim": run.fence.token,
        "key": waits[0].key,
        "until": int(min(*ends, NEVER) * 1000) if ends else None,
        "children": children,
        "need": _need(waits, len(children)),
        "approvals": approvals,
    }


def _children(run: Run, waits: tuple[Wait, ...]) -> list[list[Any]]:
    """Agent and id of every child it waits for, and the number of its last event that is known here."""
    found: dict[str, int] = {}
    for wait in waits:
        for target in wait.targets if wait.kind == "child" else ():
            if target in run.children and not run.children[target].done:
                found[target] = max(found.get(target, 0), wait.seen.get(target, 0))
    return [[run.children[target].agent, target, seen] for target, seen in found.items()]


def _need(waits: tuple[Wait, ...], unfinished: int) -> int:
    """How many children must end for the task to go on: one, unless all are branches that only wait, together."""
    groups = {wait.together for wait in waits if wait.kind == "child"}
    if len(groups) == 1 and (group := groups.pop()) is not None:
        return min(unfinished, max(1, group.need - (group.size - unfinished)))
    return min(1, unfinished)
